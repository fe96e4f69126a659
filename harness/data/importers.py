"""Where images and labels come from: a folder of classes, a CSV or Parquet manifest, a CoOp-style split JSON.

A reader lists what there is, without opening an image; `harness.data.shards.write_dataset` checks and writes it.
"""

import csv
import difflib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from harness.data.images import SUFFIXES
from harness.data.names import CLUTTER, check_class_names, class_name
from harness.errors import UserError
from harness.system.files import lines_of, read_json

NOT_NUMBERS = ("nan", "inf", "-inf", "infinity", "-infinity")
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
        if not self.records:
            raise UserError(f"no images found; files ending in {', '.join(sorted(SUFFIXES))} are taken as images")
        check_class_names(self.classes, "classes")
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

    Hidden files, what file managers leave and files that are no images are left out, and so is a link to what is listed at its
    own place; the notes count them.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: not a folder")
    rows, names, ignored, links = [], set(), 0, 0
    try:
        for split, folder in _split_folders(root):
            for class_folder in _subfolders(folder):
                name = class_name(class_folder.name)
                names.add(name)
                found = _ClassFolder(class_folder, root)
                for file in found.images:
                    rows.append(_Row(file.relative_to(root).as_posix(), name, split, None, str(file)))
                ignored, links = ignored + found.ignored, links + found.links
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    notes = [f"{ignored} hidden files or files that are no images were ignored"] if ignored else []
    notes += [f"{links} links to files or folders that are listed elsewhere were left out"] if links else []
    return _source(rows, root, classes or sorted(names), notes)


def read_manifest(file: Path, image_root: Path | None = None, classes: list[str] | None = None) -> Source:
    """Read a CSV or Parquet table: path, label (a class name), and optionally split and patient.

    Paths are relative to `image_root`, or to the table's folder. Classes are sorted by name unless given in order.
    """
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    read = _parquet_rows if file.suffix.lower() in (".parquet", ".pq") else _csv_rows
    rows = []
    try:
        for where, cells in read(file):
            path, label, split, patient = (_text(cells.get(name), f"{where}: {name}") for name in _COLUMNS)
            if not path or not label:
                raise UserError(f"{where}: the {'label' if path else 'path'} is empty")
            if label.casefold() in NOT_NUMBERS:
                raise UserError(
                    f"{where}: the label is {label!r}, as a missing number is written; it should name a class"
                )
            known = _split_name(split, where) if split else None
            rows.append(_Row(path, class_name(label), known, patient or None, where))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error
    if 0 < sum(row.split is None for row in rows) < len(rows):
        blank = next(row for row in rows if row.split is None)
        raise UserError(f"{blank.where}: no split, but other rows have one; give each row a split, or none")
    return _source(rows, image_root or file.parent, classes or sorted({row.class_name for row in rows}), [])


def _check_columns(columns: Iterable[str], file: Path) -> None:
    names = list(columns)
    if missing := [name for name in ("path", "label") if name not in names]:
        raise UserError(f"{file}: no column {missing[0]!r}; it needs path and label (and may have split, patient)")
    if twice := [name for name in _COLUMNS if names.count(name) > 1]:
        raise UserError(f"{file}: the column {twice[0]!r} is there twice")


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of each row, and its cells by column. Raises csv.Error where there is no table."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines_of(lines), strict=True)
        header = next(reader, None)
        if header is None:
            raise csv.Error("it is empty")
        _check_columns(header, file)
        for row in reader:
            where = f"{file}, row {reader.line_num}"
            if len(row) > len(header):
                raise UserError(
                    f"{where}: {len(row)} cells under {len(header)} columns; a cell with a comma needs quotes"
                )
            if row:
                yield where, dict(zip(header, row, strict=False))  # cells that are left out at the end are empty


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        _check_columns(table.schema_arrow.names, file)
        columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(columns=columns):
            for cells in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", cells
    except pa.ArrowException as error:
        raise UserError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error


def _text(cell: Any, where: str) -> str:
    """A cell as text; whole numbers without a point, since a column of integers with gaps comes as decimals."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float):
        if not math.isfinite(cell):
            raise UserError(f"{where} is {cell}; it should be text or a finite number")
        cell = int(cell) if cell.is_integer() else cell
    if not isinstance(cell, str | int | float):
        raise UserError(f"{where} is a {type(cell).__name__}; it should be text or a number")
    return str(cell).strip()


_COLUMNS = ("path", "label", "split", "patient")
_Label = Annotated[int, Field(strict=True)]
_CoopSplit = TypeAdapter(dict[Literal["train", "val", "test"], list[tuple[str, _Label, str]]])


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
        for number, (path, label, given) in enumerate(entries):
            where, name = f"{file}, {split} entry {number}", class_name(given)
            if names.setdefault(label, name) != name:
                raise UserError(f"{where}: label {label} is {name!r} here and {names[label]!r} elsewhere")
            rows.append(_Row(path, name, split, None, where))
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{file}: labels are {str(sorted(names))[:80]}; they must count 0, 1, ... without gaps")
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
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in CLUTTER


class _ClassFolder:
    """Images below a class's folder, each file once.

    Links to files and folders are followed, but not to a folder that is listed at its own place in the source, that holds the
    source, or that was visited before; of several names of one file in a class the first is taken, a real one before a link.

    Attributes:
        images: paths in order. ignored: files that are hidden or no images. links: names that were left out.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.root, self.ignored, self.links = _real(root), 0, 0
        self._visited: set[Path] = set()
        taken: dict[Path, Path] = {}
        for real, path in sorted(self._files(folder), key=lambda pair: (pair[1].is_symlink(), pair[1])):
            self.links += taken.setdefault(real, path) is not path
        self.images = sorted(taken.values())

    def _files(self, folder: Path) -> Iterator[tuple[Path, Path]]:
        """(what a name leads to, that name) of each image."""
        folders = [folder]
        while folders:
            parent = folders.pop()
            real_parent = _real(parent)
            self._visited.add(real_parent)
            for entry in parent.iterdir():
                real = _real(entry) if entry.is_symlink() else real_parent / entry.name
                if entry.is_dir():
                    if real != real_parent / entry.name and self._is_elsewhere(real):
                        self.links += 1
                    elif not _is_hidden(entry.name):
                        folders.append(entry)
                elif _is_hidden(entry.name) or entry.suffix.lower() not in SUFFIXES:
                    self.ignored += 1
                else:
                    yield real, entry

    def _is_elsewhere(self, target: Path) -> bool:
        if target in self._visited or self.root.is_relative_to(target):
            return True
        return target.is_relative_to(self.root) and not any(map(_is_hidden, target.relative_to(self.root).parts))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _split_name(text: str, where: str) -> str:
    if text.casefold() not in SPLIT_NAMES:
        raise UserError(f"{where}: {text!r} is no split; it should be train, val or test")
    return SPLIT_NAMES[text.casefold()]
