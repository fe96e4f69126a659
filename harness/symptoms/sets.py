"""Symptom sets: for each class of a task a few short phrases for what is visible in its images.

A set is a JSON file, `symptoms_cache/<task>/<name>.json`:

    {"format": "vipbench-symptoms/1", "task": "derm7pt", "modality": "dermoscopy",
     "classes": [{"name": "nevus", "symptoms": [{"text": "round even shape", "agreement": 3}]}],
     "provenance": {"kind": "hand-written", "author": "...", "created": "2026-01-31", "how": "..."}}
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt

from vipbench.harness.config.validation import parse
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.models.phrases import as_sentence, without_full_stop
from vipbench.harness.symptoms.words import Names, names_class, same_words
from vipbench.harness.system.files import digest_json, read_json, write_json

if TYPE_CHECKING:
    from vipbench.harness.models.text_tower import TextTower

CONTEXT_VECTORS = 4  # ViP's default; they share a prompt with the symptom


def fold(name: str) -> str:
    """Normalise a class name for comparison: case, underscores and runs of spaces make no difference."""
    return " ".join(name.casefold().replace("_", " ").split())


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text[:80]!r} holds control characters; it must be one line of printable text")
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


Line = Annotated[str, AfterValidator(_one_line)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Symptom(BaseModel):
    """A phrase.

    Attributes:
        agreement: the number of an LLM's answers that contain it.
        seen, truer: an LLM's probability of yes, see `vipbench.harness.symptoms.verify.Belief`.
    """

    model_config = ConfigDict(extra="forbid")

    text: Line
    agreement: NonNegativeInt | None = None
    seen: Probability | None = None
    truer: Probability | None = None


class ClassSymptoms(BaseModel):
    """A class and its symptoms, the best one first. A set with a class without any cannot be trained with."""

    model_config = ConfigDict(extra="forbid")

    name: Line
    symptoms: list[Symptom]

    @property
    def texts(self) -> list[str]:
        return [symptom.text for symptom in self.symptoms]


class SetProvenance(BaseModel):
    """Author, date and way of making of a set; a generated set adds all that went into it."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["hand-written", "generated", "imported"]
    author: Line
    created: Line  # ISO date or time
    how: Line


class SymptomSet(BaseModel):
    """The symptoms of all classes of a task."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["vipbench-symptoms/1"] = "vipbench-symptoms/1"
    task: Line
    modality: Line | None = None
    classes: list[ClassSymptoms] = Field(min_length=1)
    provenance: SetProvenance

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a set.

        Raises:
            UserError: no such file, or not a symptom set (names the file, the place in it and the problem).
        """
        content = read_json(Path(path))
        if isinstance(content, dict) and "format" not in content:
            raise UserError(
                f'{path}: no symptom set (no "format"); `vipbench symptoms import` reads the form {{"class": [...]}}'
            )
        loaded = parse(cls, content, str(path))
        refuse_twins([entry.name for entry in loaded.classes], path)
        return loaded

    def save(self, path: Path | str) -> None:
        """Write the set as JSON; the same set gives the same bytes."""
        write_json(Path(path), self.model_dump(mode="json", exclude_none=True))

    def digest(self) -> str:
        """Return the SHA-256 (hex) of class names and their texts in order; provenance and the classes' order do not count."""
        return digest_json(sorted([fold(entry.name), entry.texts] for entry in self.classes))

    def texts(self, classes: Sequence[str]) -> list[list[str]]:
        """Return the texts of each of `classes`, in their order. Names match but for case and underscores.

        Raises:
            UserError: a class is not in the set (names the nearest that is), or has no symptom.
        """
        found = {fold(entry.name): entry.texts for entry in self.classes}
        missing = [name for name in classes if fold(name) not in found]
        if missing:
            raise UserError(
                f"symptom set of {self.task!r}: no class {_listed(missing, 5)}; {_nearest_class(missing[0], self)}"
            )
        empty = [name for name in classes if not found[fold(name)]]
        if empty:
            raise UserError(f"symptom set of {self.task!r}: no symptom for {_listed(empty, 5)}; generate or write some")
        return [found[fold(name)] for name in classes]


def load_sets(files: Path | tuple[Path, ...] | None) -> list[SymptomSet]:
    """Read the symptom sets that a config names. Raises UserError for a file that is none."""
    paths = [files] if isinstance(files, Path) else (files or ())
    return [SymptomSet.load(path) for path in paths]


def sets_digest(sets: Sequence[SymptomSet]) -> str | None:
    """Return the digest of the content of one symptom set or several; None without any."""
    digests = [symptoms.digest() for symptoms in sets]
    return digest_json(digests) if len(digests) > 1 else (digests[0] if digests else None)


def import_plain(path: Path, *, task: str, modality: str | None, author: str) -> SymptomSet:
    """Read the plain form `{"class": ["symptom", ...]}`, which the ViP repository uses.

    Raises:
        UserError: the file is not of that form, or names a class twice.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path}: not of the form {{"class": ["symptom", ...]}}')
    for name, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: class {name[:80]!r}: its value must be a list of texts")
    refuse_twins(content, path)
    classes = [{"name": name, "symptoms": [{"text": text} for text in texts]} for name, texts in content.items()]
    provenance = {
        "kind": "imported",
        "author": author,
        "created": datetime.now(UTC).date().isoformat(),
        "how": f"vipbench symptoms import {path.name}",
    }
    content = {"task": task, "modality": modality, "classes": classes, "provenance": provenance}
    return parse(SymptomSet, content, str(path))


def difference(left: SymptomSet, right: SymptomSet) -> list[str]:
    """Compare two sets line by line: "  class", then "- text" (only left) and "+ text" (only right), or the other order.

    Texts match but for case and a full stop.
    """
    classes = {fold(entry.name): entry.name for entry in (*left.classes, *right.classes)}
    lines = []
    for key, name in classes.items():
        old, new = _keyed_texts(left, key), _keyed_texts(right, key)
        if list(old) == list(new):
            continue
        lines.append(f"  {name}")
        lines += [f"- {text}" for key, text in old.items() if key not in new]
        lines += [f"+ {text}" for key, text in new.items() if key not in old]
        if old.keys() == new.keys():
            lines.append(f"the same in another order: {'; '.join(new.values())}")
    return lines


def _keyed_texts(symptoms: SymptomSet, key: str) -> dict[str, str]:
    texts = [text for entry in symptoms.classes if fold(entry.name) == key for text in entry.texts]
    return {without_full_stop(fold(text)): text for text in texts}


def check(symptoms: SymptomSet, classes: Sequence[str] | None = None, tower: "TextTower | None" = None) -> list[str]:
    """List the mistakes in a set, one line each.

    Classes that do not match `classes` (a dataset's), classes without a symptom, texts that occur twice (in a class, or in
    several), that name a class, or that are too long for `tower`.
    """
    problems = _class_problems(symptoms, classes) if classes is not None else []
    names = Names(entry.name for entry in symptoms.classes)
    for entry in symptoms.classes:
        if not entry.symptoms:
            problems.append(f"class {entry.name!r}: no symptom")
        problems += _duplicates(entry)
        problems += [
            f"class {entry.name!r}: {text!r} names {'the' if names_class(text, [entry.name]) else 'another'} class"
            for text in entry.texts
            if names.found_in(text)
        ]
        if tower is not None:
            problems += [problem for text in entry.texts if (problem := _too_long(entry.name, text, tower))]
    return problems + _shared(symptoms)


def most_tokens(tower: "TextTower") -> int:
    """Count the tokens left for a symptom (with its full stop) beside start, end and ViP's context vectors."""
    return tower.context_length - tower.special_tokens - CONTEXT_VECTORS


def _class_problems(symptoms: SymptomSet, classes: Sequence[str]) -> list[str]:
    own = {fold(entry.name): entry.name for entry in symptoms.classes}
    wanted = {fold(name): name for name in classes}
    problems = [
        f"class {name!r} of the dataset is not in the set; {_nearest_class(name, symptoms)}"
        for key, name in wanted.items()
        if key not in own
    ]
    return problems + [f"class {name!r} is no class of the dataset" for key, name in own.items() if key not in wanted]


def _duplicates(entry: ClassSymptoms) -> list[str]:
    return [
        f"class {entry.name!r}: {text!r} says the same as {earlier!r}"
        for position, text in enumerate(entry.texts)
        for earlier in entry.texts[:position]
        if same_words(text, earlier)
    ]


def _shared(symptoms: SymptomSet) -> list[str]:
    classes: dict[str, list[str]] = {}
    for entry in symptoms.classes:
        for text in dict.fromkeys(without_full_stop(fold(text)) for text in entry.texts):
            classes.setdefault(text, []).append(entry.name)
    return [f"{text!r} is said of {_listed(names)}" for text, names in classes.items() if len(names) > 1]


def _too_long(name: str, text: str, tower: "TextTower") -> str | None:
    tokens, most = len(tower.tokenize(as_sentence(text))), most_tokens(tower)
    if tokens <= most:
        return None
    place = f"room for {most} beside {CONTEXT_VECTORS} context vectors"
    return f"class {name!r}: {text!r} has {tokens} tokens; the text tower has {place}"


def refuse_twins(names: Iterable[str], path: Path | str) -> None:
    """Raise UserError where two class names differ only in case, underscores or spaces; `path` begins the message."""
    seen: dict[str, str] = {}
    for name in names:
        if fold(name) in seen:
            raise UserError(f"{path}: class {name[:80]!r} occurs twice (also as {seen[fold(name)][:80]!r})")
        seen[fold(name)] = name


def _nearest_class(name: str, symptoms: SymptomSet) -> str:
    names = [entry.name for entry in symptoms.classes]
    return did_you_mean(name, names, otherwise=f"it has {_listed(names, 10)}")


def _listed(names: Sequence[str], most: int | None = None) -> str:
    return ", ".join(map(repr, names[:most]))
