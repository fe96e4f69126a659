"""The result of an importer: a source's labelled images, each with the sample id that is made of its path."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from vipbench.harness.data.images import SUFFIXES, ImageFile, StoredImage
from vipbench.harness.data.names import check_class_names, renamed, sorted_classes
from vipbench.harness.errors import UserError, did_you_mean

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Record:
    """One labelled image.

    Attributes:
        key: the sample's id: its relative path without suffix and without dots, unless the importer makes another.
        path: the image file, or the file that holds the image.
        label: the class's position among the source's classes.
        split: "train", "val" or "test"; None where the source has no splits.
        patient: the source's own id of the patient, None where unknown. It is not stored.
        metadata: values by column, None where unknown; every record of a source has the same columns.
        inside: the image's place in a file that holds several; "" in one of its own.
    """

    key: str
    path: Path
    label: int
    split: str | None = None
    patient: str | None = None
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    inside: str = ""

    @property
    def place(self) -> str:
        """The image's file and its place there, for messages."""
        return f"{self.path}, {self.inside}" if self.inside else str(self.path)


@dataclass(frozen=True)
class Source:
    """Labelled images.

    Attributes:
        notes: decisions of the importer.
        images: yields the images in the order of the records, once; None: each record's path is an image file.
        pseudonymous: file names and ids may identify somebody: keys and patients are pseudonyms, which are stored as they are,
            and nothing else of the source is written.
        ordinal: the order of the classes is one of degree.

    Raises:
        UserError: there are no images, two have one key, or classes are not distinct names.
    """

    classes: list[str]
    records: list[Record]
    notes: list[str] = field(default_factory=list)
    images: Callable[[], Iterator[StoredImage]] | None = None
    pseudonymous: bool = False
    ordinal: bool = False

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

    def read_images(self) -> Iterator[StoredImage]:
        """The images, in the order of the records."""
        return self.images() if self.images else (ImageFile(record.path) for record in self.records)

    def rename(self, changes: Mapping[str, str]) -> "Source":
        """The source with other names of classes; two that get one name become one class.

        Raises:
            UserError: a class that is to be renamed is not there.
        """
        if not changes:
            return self
        names = renamed(self.classes, changes, "the source")
        classes = list(dict.fromkeys(names))
        records = [replace(record, label=classes.index(names[record.label])) for record in self.records]
        notes = [f"class {old!r} of the source is called {new!r}" for old, new in changes.items()]
        return replace(self, classes=classes, records=records, notes=[*self.notes, *notes])

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of images of each class in each split that the source names; "all" where it names none."""
        found = {
            split: dict.fromkeys(self.classes, 0) for split in dict.fromkeys(r.split or "all" for r in self.records)
        }
        for record in self.records:
            found[record.split or "all"][self.classes[record.label]] += 1
        return found


class Row(NamedTuple):
    """An image as a source names it; `where` is its place in the source, for messages."""

    path: str
    class_name: str
    split: str | None
    patient: str | None
    where: str
    metadata: Mapping[str, str | None] = MappingProxyType({})


def make_source(rows: list[Row], root: Path, classes: Sequence[str] | None = None, notes: Sequence[str] = ()) -> Source:
    """Make a source of rows whose paths are relative to `root`.

    Args:
        classes: names in the order of their labels; None: those of the rows, sorted.

    Raises:
        UserError: a row's class is none of `classes`, or is that of several, a path leaves `root`, or as `Source` does.
    """
    if classes is None:
        places: dict[str, str] = {}
        for row in rows:
            places.setdefault(row.class_name, row.where)
        classes = sorted_classes(places)
    labels = {name: label for label, name in enumerate(classes)}
    records = []
    for row in rows:
        if row.class_name not in labels:
            hint = did_you_mean(row.class_name, classes, otherwise=f"the classes are {classes}")
            raise UserError(f"{row.where}: {row.class_name!r} is no class; {hint}")
        key = sample_key(row.path, row.where)
        label = labels[row.class_name]
        records.append(Record(key, root / row.path, label, row.split, row.patient, dict(row.metadata)))
    return Source(list(classes), records, list(notes))


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
