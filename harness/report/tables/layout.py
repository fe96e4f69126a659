"""The layout of a table, from a YAML file: display names, the order of rows, caption and label.

names: {vip: ViP, "zero_shot (text=symptoms)": "CLIP, symptoms", accuracy: Acc., shots: images per class}
order: [zero_shot, coop, vip]
caption: Test accuracy on drawn lesions.
label: tab:lesions
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.system.files import read_yaml

Words = Annotated[str, StringConstraints(min_length=1)]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:._-]+$")]


class Layout(Section):
    """Names to show for values and settings, the order of rows (by a value of theirs), caption and LaTeX label."""

    names: Mapping[str, Words] = Field(default_factory=dict)
    order: tuple[str, ...] = ()
    caption: str = ""
    label: Label | None = None

    def name(self, text: str) -> str:
        """The display name of a value or setting; that of a method counts before its options: "ViP (merge=mean)"."""
        if text in self.names:
            return self.names[text]
        before, options, after = text.partition(" (")
        return self.names.get(before, before) + options + after

    def place(self, shown: Sequence[str]) -> int:
        """The place of a row in the order, by the first of its values that is named there; those that are not come last."""
        for place, name in enumerate(self.order):
            if any(_stands_for(name, value) for value in shown):
                return place
        return len(self.order)

    def check_order(self, rows: Sequence[Sequence[str]]) -> None:
        """Raise UserError where the order names a row that the table does not have."""
        values = {value for row in rows for value in row}
        for name in self.order:
            if not any(_stands_for(name, value) for value in values):
                raise UserError(f"order: the table has no row {name!r}; {did_you_mean(name, values)}")


def _stands_for(name: str, value: str) -> bool:
    """Check that a value is called that, with or without a method's options behind it."""
    return value == name or value.startswith(f"{name} (")


def read_layout(path: Path) -> Layout:
    """Read a layout. Raises UserError where the file is none."""
    return validate(Layout, read_yaml(path), where=str(path))
