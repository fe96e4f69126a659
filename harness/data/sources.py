"""Where images and labels come from: a folder of classes, a CSV or Parquet manifest, a CoOp-style split JSON.

A reader lists what there is, without opening an image; `harness.data.shards.write_dataset` checks and writes it.
"""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from harness.data.images import SUFFIXES
from harness.errors import UserError
from harness.files import read_json

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Record:
    """One labelled image file.

    Attributes:
        key: the sample's id: its relative path without suffix and without dots.
        path: the image file.
        label: the class's position among the source's classes.
        split: "train", "val" or "test"; None where the source has no splits.
        patient: the source's own id of the patient, None where unknown. It is not stored.
    """

    key: str
    path: Path
    label: int
    split: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Source:
    """Labelled image files. Raises UserError where there are none, two have one key, or classes are not distinct names."""

    classes: list[str]
    records: list[Record]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes) or not all(name.strip() for name in self.classes):
            raise UserError(f"classes: {self.classes} are not distinct, non-empty names")
        if not self.records:
            raise UserError(f"no images found; files ending in {', '.join(sorted(SUFFIXES))} are taken as images")
        taken: dict[str, Path] = {}
        for record in self.records:
            if (other := taken.setdefault(record.key, record.path)) is not record.path:
                raise UserError(
                    f"{other} and {record.path} would both be sample {record.key!r}; "
                    "each image needs a name of its own, whatever its suffix, and is listed once"
                )


class _Row(NamedTuple):
    """An image as a source names it; `where` says where, for messages."""

    path: str
    class_name: str
    split: str | None
    patient: str | None
    where: str


def read_folder(root: Path, classes: list[str] | None = None) -> Source:
    """List ROOT/<split>/<class>/... or ROOT/<class>/... ; classes are sorted by name unless given in order.

    Hidden files and files that are no images are left out, and counted in the notes.
    """
    if not root.is_dir():
        raise UserError(f"{root}: not a folder")
    rows, names, ignored = [], set(), 0
    for split, folder in _split_folders(root):
        for class_folder in _subfolders(folder):
            names.add(class_folder.name)
            for file in _files(class_folder):
                if file.name.startswith(".") or file.suffix.lower() not in SUFFIXES:
                    ignored += 1
                else:
                    path = file.relative_to(root).as_posix()
                    rows.append(_Row(path, class_folder.name, split, None, str(file)))
    notes = [f"{ignored} hidden files or files that are no images were ignored"] if ignored else []
    return _source(rows, root, classes or sorted(names), notes)


def read_manifest(file: Path, image_root: Path | None = None, classes: list[str] | None = None) -> Source:
    """Read a CSV or Parquet table: path, label (a class name), and optionally split and patient.

    Paths are relative to `image_root`, or to the table's folder. Classes are sorted by name unless given in order.
    """
    import pandas as pd  # slow to import

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            table, first_line = pd.read_parquet(file), 1
        else:
            table, first_line = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig"), 2
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsing errors are ValueErrors
        raise UserError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error
    columns = list(table.columns)
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise UserError(f"{file}: no column {missing[0]!r}; it needs path and label (and may have split, patient)")
    rows = []
    texts = table.reindex(columns=list(_COLUMNS)).astype("string").fillna("")
    for number, cells in enumerate(texts.itertuples(index=False, name=None), start=first_line):
        path, label, split, patient = (cell.strip() for cell in cells)
        where = f"{file}, row {number}"
        if not path or not label:
            raise UserError(f"{where}: the {'label' if path else 'path'} is empty")
        rows.append(_Row(path, label, _split_name(split, where) if split else None, patient or None, where))
    if 0 < sum(row.split is None for row in rows) < len(rows):
        blank = next(row for row in rows if row.split is None)
        raise UserError(f"{blank.where}: no split, but other rows have one; give each row a split, or none")
    return _source(rows, image_root or file.parent, classes or sorted({row.class_name for row in rows}), [])


_COLUMNS = ("path", "label", "split", "patient")
_CoopSplit = TypeAdapter(dict[Literal["train", "val", "test"], list[tuple[str, int, str]]])


def read_coop_split(file: Path, image_root: Path | None = None, classes: list[str] | None = None) -> Source:
    """Read {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}, as CoOp's repository writes it.

    Paths are relative to `image_root`, or to the file's folder. Classes are in the order of their labels unless given.
    """
    try:
        splits = _CoopSplit.validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        place = " / ".join(str(part) for part in first["loc"])
        raise UserError(
            f'{file}: not a CoOp split: {place}: {first["msg"]}; it should be {{"train": [[path, label, class], ...], ...}}'
        ) from error
    rows, names = [], dict[int, str]()
    for split, entries in splits.items():
        for number, (path, label, class_name) in enumerate(entries):
            where = f"{file}, {split} entry {number}"
            if names.setdefault(label, class_name) != class_name:
                raise UserError(f"{where}: label {label} is {class_name!r} here and {names[label]!r} elsewhere")
            rows.append(_Row(path, class_name, split, None, where))
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{file}: labels are {sorted(names)}; they must count 0, 1, ... without gaps")
    return _source(rows, image_root or file.parent, classes or [names[label] for label in sorted(names)], [])


def sample_key(path: str, where: str) -> str:
    """A relative path as a sample's id: without suffix; dots become "_", since webdataset ends the key at a dot.

    Raises:
        UserError: the path leaves its folder, or is not valid Unicode.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise UserError(f"{where}: {path!r} must be a path relative to the image root, and inside it")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the file's name {path!r} is not valid UTF-8; rename it") from error
    return str(relative.with_suffix("")).replace(".", "_")


def _source(rows: list[_Row], root: Path, classes: list[str], notes: list[str]) -> Source:
    labels = {name: label for label, name in enumerate(classes)}
    records = []
    for row in rows:
        if row.class_name not in labels:
            near = difflib.get_close_matches(row.class_name, classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {classes}"
            raise UserError(f"{row.where}: {row.class_name!r} is no class; {hint}")
        key = sample_key(row.path, row.where)
        records.append(Record(key, root / row.path, labels[row.class_name], row.split, row.patient))
    return Source(classes, records, notes)


def _split_folders(root: Path) -> list[tuple[str | None, Path]]:
    """The folders that hold class folders, each with its split; the root itself where there are no splits."""
    found = {folder: SPLIT_NAMES.get(folder.name.casefold()) for folder in _subfolders(root)}
    splits = [split for split in found.values() if split]
    if not splits:
        for inner in (inner for folder in found for inner in _visible_folders(folder)):
            if inner.name.casefold() in SPLIT_NAMES:
                raise UserError(
                    f"{inner}: a split inside {inner.parent.name}/; SOURCE should hold <split>/<class>/ or <class>/"
                )
        return [(None, root)]
    if others := sorted(folder.name for folder, split in found.items() if not split):
        raise UserError(f"{root}: has folders of splits and also {others}; it should hold splits only, or classes only")
    if len(set(splits)) < len(splits):
        raise UserError(f"{root}: {sorted(folder.name for folder in found)} name one split twice")
    return [(split, folder) for folder, split in found.items()]


def _subfolders(folder: Path) -> list[Path]:
    """Folders in name order, hidden ones left out. Raises UserError where an image lies beside them, in no class."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry.suffix.lower() in SUFFIXES and not entry.name.startswith("."):
            raise UserError(f"{entry}: an image outside the class folders; put it into a folder named by its class")
    return _visible_folders(folder)


def _visible_folders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in path order, hidden folders left out; links are followed."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files))


def _split_name(text: str, where: str) -> str:
    if text.casefold() not in SPLIT_NAMES:
        raise UserError(f"{where}: {text!r} is no split; it should be train, val or test")
    return SPLIT_NAMES[text.casefold()]
