"""A dataset of the library `datasets` on disk, its images inside: Parquet as the hub has it, Arrow as `save_to_disk` writes it.

The features that the library writes into the files' schema give the columns of images and labels, and the names of classes.
Splits are those of the files' names or folders: data/train-00000-of-00002.parquet, train/0000.parquet, test/data-00000.arrow.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vipbench.harness.data.images import ImageBytes
from vipbench.harness.data.importers.base import SPLIT_NAMES, Record, Source
from vipbench.harness.data.names import class_name, refuse_several_labels, sorted_classes
from vipbench.harness.errors import UserError, did_you_mean

SUFFIXES = (".parquet", ".arrow")
LEFTOVER = re.compile(r"(cache|tmp)-.*")  # files of the library's that are no part of the dataset
ROWS = 64  # at a time, which bounds memory
PATIENT = "patient"
Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image, label: their names. names: classes in the order of numbers that stand for them; None: labels are names.
        others: patient, where there is one, and metadata.
    """

    image: str
    label: str
    names: list[str] | None
    others: list[str] = field(default_factory=list)


def read(
    folder: Path,
    classes: list[str] | None = None,
    image_root: Path | None = None,
    metadata: Sequence[str] = (),
    label_column: str | None = None,
) -> Source:
    """List the images of FOLDER. Classes are those of the features, in their order, unless given in another.

    Args:
        metadata: columns to keep. label_column: the one that gives the class, where there are several.

    Raises:
        UserError: no files of this kind, no column of images or of single labels, or a label that is no class.
    """
    if image_root:
        raise UserError("--image-root: the files hold their images; leave the option out")
    files = _files(folder)
    columns = _columns(files[0][1], metadata, label_column)
    places: dict[str, str] = {}
    listed: list[tuple[str, str | None, Path, str, dict[str, Any]]] = []
    for split, file in files:
        for where, row in _rows(file, [columns.label, *columns.others]):
            name = _class(row[columns.label], columns, f"{file}, {where}")
            places.setdefault(name, f"{file}, {where}")
            listed.append((name, split, file, where, row))
    if classes is None:
        refuse_several_labels(dict.fromkeys(columns.names or [], str(files[0][1])) | places)
    names = classes or columns.names or sorted_classes(places)
    if unknown := next((name for name in places if name not in names), None):
        hint = did_you_mean(unknown, names, otherwise=f"the classes are {names}")
        raise UserError(f"{places[unknown]}: {unknown!r} is no class; {hint}")
    labels = {name: label for label, name in enumerate(names)}
    records = [
        Record(
            key=f"{split or 'all'}/{number:08d}",
            path=file,
            label=labels[name],
            split=split,
            patient=_text(row.get(PATIENT)),
            metadata={key: _text(row[key]) for key in metadata},
            inside=where,
        )
        for number, (name, split, file, where, row) in enumerate(listed)
    ]
    return Source(list(names), records, [], lambda: _images([file for _, file in files], columns.image))


def _files(folder: Path) -> list[tuple[str | None, Path]]:
    """Data files, each with its split, in order. Raises UserError where there are none, or their splits are unclear."""
    inside = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES) if folder.is_dir() else [folder]
    found = [path for path in inside if path.is_file() and not LEFTOVER.fullmatch(path.name)]
    if not found or not folder.exists():
        raise UserError(f"{folder}: no .parquet or .arrow files, as the hub and datasets' save_to_disk write them")
    splits = {path: _split(path.relative_to(folder) if path != folder else Path(path.name)) for path in found}
    if None in splits.values() and set(splits.values()) != {None}:
        unclear = next(path for path, split in splits.items() if split is None)
        raise UserError(
            f"{unclear}: of no split, but other files are; SOURCE should be one configuration of the dataset"
        )
    for split in set(splits.values()):
        folders = {path.parent for path in found if splits[path] == split}
        if len(folders) > 1:
            shown = ", ".join(sorted(str(path) for path in folders)[:3])
            raise UserError(f"{folder}: {split or 'data'} is in several folders ({shown}); name one of them")
    return [(splits[path], path) for path in found]


def _split(path: Path) -> str | None:
    """The split that a relative path names: a folder, or the beginning of the file's name."""
    for word in (*path.parts[:-1], re.split(r"[-_.]", path.name)[0]):
        if word.casefold() in SPLIT_NAMES:
            return SPLIT_NAMES[word.casefold()]
    return None


def _columns(file: Path, metadata: Sequence[str], label_column: str | None) -> Columns:
    """The columns of images and labels, from the features in the schema. Raises UserError where they are unclear."""
    schema = _schema(file)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {
            name: str(feature.get("_type")) if isinstance(feature, dict) else "list"
            for name, feature in features.items()
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        features, kinds = {}, {}
    for name in (*metadata, *([label_column] if label_column else [])):
        if name not in schema.names:
            raise UserError(f"{file}: no column {name!r}; {did_you_mean(name, schema.names)}")
    image = _only([name for name in schema.names if kinds.get(name) == "Image"], "image", schema.names, file, "")
    marked = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    hint = "; name one with --label-column"
    label = label_column or _only(marked, "label", schema.names, file, hint)
    if pa.types.is_list(schema.field(label).type) or pa.types.is_large_list(schema.field(label).type):
        raise UserError(
            f"{file}: {label!r} is a list: several labels of one image (multi-label), and an image has one class here"
        )
    given = features[label].get("names") if label in marked else None
    names = [class_name(str(name)) for name in given] if isinstance(given, list) else None
    patient = [PATIENT] if PATIENT in schema.names else []
    return Columns(image, label, names, [*patient, *metadata])


def _only(marked: list[str], usual: str, columns: list[str], file: Path, hint: str) -> str:
    """The one column of a kind: that of the usual name, or the only one that the features mark."""
    if usual in columns and (usual in marked or not marked):
        return usual
    if len(marked) != 1:
        which = ", ".join(marked or columns)
        raise UserError(f"{file}: {'several columns' if marked else 'no column'} of {usual}s among {which}{hint}")
    return marked[0]


def _class(value: Any, columns: Columns, where: str) -> str:
    """The name that a label stands for. Raises UserError where it is none."""
    if isinstance(value, str) and value.strip():
        return class_name(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if columns.names is None:
            return str(value)
        if 0 <= value < len(columns.names):
            return columns.names[value]
        raise UserError(
            f"{where}: {columns.label} is {value}, which is none of {len(columns.names)} classes (-1: unlabelled)"
        )
    raise UserError(f"{where}: {columns.label} is {str(value)[:50]!r}; it should be a class's name or number")


def _text(value: Any) -> str | None:
    return None if value is None or value != value else str(value).strip() or None


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Raise UserError where a file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _schema(file: Path) -> pa.Schema:
    with _damage(file):
        if file.suffix == ".parquet":
            return pq.read_schema(file)
        with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as reader:
            return reader.schema


def _rows(file: Path, columns: list[str]) -> Rows:
    """Each row's place in the file, and its cells."""
    number = 0
    for batch in _batches(file, list(dict.fromkeys(columns))):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of some columns, of at most `ROWS` rows. Raises UserError where the file is damaged."""
    with _damage(file):
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=columns):
                batch.validate(full=True)
                yield batch
            return
        with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as reader:
            for batch in reader:
                chosen = batch.select(columns)
                chosen.validate(full=True)  # places in the file, and text
                for first in range(0, len(chosen), ROWS):
                    yield chosen.slice(first, ROWS)


def _images(files: Sequence[Path], column: str) -> Iterator[ImageBytes]:
    for file in files:
        for where, row in _rows(file, [column]):
            value = row[column]
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise UserError(
                    f"{file}, {where}: {column} holds no image's bytes, only a path or nothing; embed the images"
                )
            yield ImageBytes(data)
