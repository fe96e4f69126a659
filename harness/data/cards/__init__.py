"""Dataset cards: what is known of a public dataset, in a file each. A fact that could not be checked is left out.

`vipbench datasets` lists them, and `vipbench prepare DIR --recipe NAME` compares what it finds with one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vipbench.harness.config.validation import validate
from vipbench.harness.data.info import ClassNames
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.system.files import read_yaml

Text = Annotated[str, Field(min_length=1)]
Counts = int | dict[str, int]


class Card(BaseModel):
    """A public dataset as its publisher or a paper splits it.

    Attributes:
        title: its name in papers. source: where to get it. licence: of the images. citation: of the paper.
        task: classes with one per image; ordinal: they are grades; multi-label: several per image, which is refused.
        format: the importer that reads it. file: its input in the downloaded folder; None: the folder itself.
        image_root: where its paths start, in the folder. layout: the folder in words.
        classes: names in the order of their labels.
        counts: images of each split, by class where that is known; "all" where it has no splits.
        leaks: known flaws of the split. split_file: where the split is published. checked: where these facts are from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: Text
    modality: Text
    task: Literal["classes", "ordinal", "multi-label"] = "classes"
    source: Text
    licence: Text | None = None
    citation: Text
    format: Text
    file: Text | None = None
    image_root: Text | None = None
    layout: Text
    classes: Annotated[ClassNames, Field(min_length=2)]
    counts: dict[Literal["train", "val", "test", "all"], Counts]
    leaks: list[Text] = []
    split_file: Text | None = None
    checked: Text

    @model_validator(mode="after")
    def _counts(self) -> Self:
        for split, counts in self.counts.items():
            if isinstance(counts, dict) and list(counts) != self.classes:
                raise ValueError(f"counts of {split} are not of the classes, in their order")
        return self

    def total(self, split: str) -> int:
        """The number of images of a split."""
        counts = self.counts[split]  # type: ignore[index]
        return counts if isinstance(counts, int) else sum(counts.values())

    def place(self, source: Path) -> tuple[Path, Path | None]:
        """The importer's input and the root of its paths, in a downloaded folder; a file that is given is itself the input."""
        folder = source if source.is_dir() else source.parent
        root = folder / self.image_root if self.image_root else None
        return (source / self.file if self.file and source.is_dir() else source), root

    def text(self, name: str) -> str:
        """The card in words, a line per fact; a fact that is not known has none."""
        lines = [f"{name}: {self.title} ({self.modality})"]
        for key in ("source", "licence", "citation", "task", "layout", "split_file"):
            if (value := getattr(self, key)) is not None:
                lines.append(f"{key.replace('_', ' ')}: {value}")
        for split, counts in self.counts.items():
            by_class = (
                f" ({', '.join(f'{name} {n}' for name, n in counts.items())})" if isinstance(counts, dict) else ""
            )
            lines.append(f"{split}: {self.total(split)} images{by_class}")
        lines += [f"classes: {', '.join(self.classes)}", *(f"known flaw: {leak}" for leak in self.leaks)]
        lines += [f"facts from: {self.checked}", f"vipbench prepare DIR --recipe {name} --out data/{name}"]
        return "\n".join(lines)

    def differences(self, found: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Phrases for what differs from the card.

        Args:
            found: images by split and class.
        """
        classes = list(next(iter(found.values())))
        if set(classes) != set(self.classes):
            return [f"the classes are {classes}, not {self.classes}"]
        if set(found) != set(self.counts):
            return [f"the splits are {', '.join(found)}, not {', '.join(self.counts)}"]
        phrases = []
        for split, counts in self.counts.items():
            if isinstance(counts, int):
                own = {"": (sum(found[split].values()), counts)}
            else:
                own = {f" of {name!r}": (found[split][name], count) for name, count in counts.items()}
            phrases += [
                f"{split} has {here} images{name}, not {count}" for name, (here, count) in own.items() if here != count
            ]
        return phrases


def card_names() -> list[str]:
    """Names of all cards."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_card(name: str) -> Card:
    """The card of a dataset. Raises UserError where there is none of this name."""
    if name not in card_names():
        hint = did_you_mean(name, card_names(), otherwise="`vipbench datasets` lists them")
        raise UserError(f"there is no card of a dataset {name[:50]!r}; {hint}")
    path = Path(__file__).parent / f"{name}.yaml"
    return validate(Card, read_yaml(path), where=str(path))
