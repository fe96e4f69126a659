"""The result of an importer: a source's labelled images, each with the sample id that is made of its path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from vipbench.harness.data.images import SUFFIXES
from vipbench.harness.data.names import check_class_names
from vipbench.harness.errors import UserError, did_you_mean

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
        metadata: values by column, None where unknown; every record of a source has the same columns.
    """

    key: str
    path: Path
    label: int
    split: str | None = None
    patient: str | None = None
    metadata: Mapping[str, str | None] = field(default_factory=dict)


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


class Row(NamedTuple):
    """An image as a source names it; `where` is its place in the source, for messages."""

    path: str
    class_name: str
    split: str | None
    patient: str | None
    where: str
    metadata: Mapping[str, str | None] = MappingProxyType({})


def make_source(rows: list[Row], root: Path, classes: list[str], notes: Sequence[str] = ()) -> Source:
    """Make a source of rows whose paths are relative to `root`.

    Raises:
        UserError: a row's class is none of `classes`, its path leaves `root`, or as `Source` does.
    """
    labels = {name: label for label, name in enumerate(classes)}
    records = []
    for row in rows:
        if row.class_name not in labels:
            hint = did_you_mean(row.class_name, classes, otherwise=f"the classes are {classes}")
            raise UserError(f"{row.where}: {row.class_name!r} is no class; {hint}")
        key = sample_key(row.path, row.where)
        label = labels[row.class_name]
        records.append(Record(key, root / row.path, label, row.split, row.patient, dict(row.metadata)))
    return Source(classes, records, list(notes))


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


def split_name(text: str, where: str) -> str:
    """The split of a name such as "Validation". Raises UserError where it is none."""
    if text.casefold() not in SPLIT_NAMES:
        raise UserError(f"{where}: {text!r} is no split; it should be train, val or test")
    return SPLIT_NAMES[text.casefold()]
