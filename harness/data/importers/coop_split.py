"""A split file as CoOp's repository (github.com/KaiyangZhou/CoOp) writes it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from vipbench.harness.config.validation import first_problem
from vipbench.harness.data.importers.base import Row, Source, make_source
from vipbench.harness.data.names import class_name, refuse_several_labels
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_json

_Label = Annotated[int, Field(strict=True)]
_CoopSplit = TypeAdapter(dict[Literal["train", "val", "test"], list[tuple[str, _Label, str]]])


def read(file: Path, classes: list[str] | None = None, image_root: Path | None = None) -> Source:
    """Read {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}, as CoOp's repository writes it.

    Paths are relative to `image_root`, or to the file's folder. Classes are in the order of their labels unless given.
    """
    try:
        splits = _CoopSplit.validate_python(read_json(file))
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(
            f'{file}: not a CoOp split: {problem}; it should be {{"train": [[path, label, class], ...], ...}}'
        ) from error
    rows, names = [], dict[int, str]()
    for split, entries in splits.items():
        for number, (path, label, given) in enumerate(entries):
            where, name = f"{file}, {split} entry {number}", class_name(given)
            if names.setdefault(label, name) != name:
                raise UserError(f"{where}: label {label} is {name!r} here and {names[label]!r} elsewhere")
            rows.append(Row(path, name, split, None, where))
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{file}: labels are {str(sorted(names))[:80]}; they must count 0, 1, ... without gaps")
    if classes is None:
        refuse_several_labels({name: f"{file}, label {label}" for label, name in names.items()})
    return make_source(rows, image_root or file.parent, classes or [names[label] for label in sorted(names)])
