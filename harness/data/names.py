"""Names that come from outside: of classes, of files, of members of a tar; one rule for each, whatever they come from."""

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.system.files import read_whole

MAX_NAME = 200  # characters of a class's or dataset's name
SHA256_HEX = r"[0-9a-f]{64}"
SHA256 = f"^{SHA256_HEX}$"
COLUMN = re.compile(r"[^\W\d][\w.-]{0,63}")
MAX_METADATA = 100  # columns
RESERVED = (  # columns of an index and of predictions
    *("key", "label", "patient", "extension", "offset", "size", "sha256"),
    *("id", "class", "predicted", "logits", "probabilities"),
)
NUMBER = re.compile(r"[-+]?[0-9]{1,15}(?:\.[0-9]{1,15})?")
SEPARATORS = "|;,+&/"  # between the labels of an image that has several
URL = re.compile(r"[a-z][a-z0-9+]*://[^\x00-\x1f\x7f]+")

# What file managers, archivers and file systems leave lying about; hidden names are passed over as well.
CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "dicomdir"}
DOCUMENTS = {"readme", "license", "licence", "copying", "changelog", "changes", "citation", "notice"}
DOCUMENT_SUFFIXES = {"", ".md", ".txt", ".rst", ".cff"}


def class_name(text: str) -> str:
    """A class's name as it is compared and stored: composed Unicode (NFC), each run of white space one space, none around."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raise UserError unless each is `class_name`'s form, printable, of 1 to 200 characters, and no two are the same."""
    for place, name in enumerate(names):
        if not name or name != class_name(name) or not name.isprintable() or len(name) > MAX_NAME:
            wanted = f"names are distinct, of 1 to {MAX_NAME} printable characters"
            raise UserError(f"{where}: class {place} is {name[:50]!r}; {wanted}")
    if len(set(names)) < len(names):
        twin = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"{where}: the class {twin!r} is there twice; names must be distinct")
    if not names:
        raise UserError(f"{where}: no class is named")


def refuse_several_labels(places: Mapping[str, str]) -> None:
    """Raise UserError where a label holds several classes' names between separators, so that an image has several labels.

    Args:
        places: each label, and the first place that has it.
    """
    for name, where in places.items():
        for separator in SEPARATORS:
            parts = [class_name(part) for part in name.split(separator)]
            if len(parts) > 1 and all(parts) and (separator == "|" or set(parts) <= places.keys()):
                raise UserError(
                    f"{where}: {name[:80]!r} names {len(parts)} classes, separated by {separator!r}: several labels of one image "
                    "(multi-label), and an image has one class here; leave such images out, or list the name in --classes "
                    "where it is a class's own"
                )


def sorted_classes(places: Mapping[str, str]) -> list[str]:
    """Class names that labels give, in order: by value where all are numbers, else as text. Raises as `refuse_several_labels`."""
    refuse_several_labels(places)
    return sorted(places, key=float) if all(map(NUMBER.fullmatch, places)) else sorted(places)


def renames(options: Sequence[str]) -> dict[str, str]:
    """New names of classes by their old ones, from `--rename "OLD=NEW"`. Raises UserError where one is not of that form."""
    found: dict[str, str] = {}
    for option in options:
        old, equals, new = (class_name(part) for part in option.partition("="))
        if not equals or "=" in new or old in found:
            raise UserError(f'--rename: {option[:80]!r}; it should be "OLD=NEW", each old name once')
        check_class_names([old], "--rename")
        check_class_names([new], "--rename")
        found[old] = new
    return found


def renamed(classes: Sequence[str], changes: Mapping[str, str], where: str) -> list[str]:
    """Class names after renaming, in the same order. Raises UserError where one that is to be renamed is not among them."""
    for old in changes:
        if old not in classes:
            raise UserError(f"--rename: {where} has no class {old!r}; {did_you_mean(old, classes)}")
    return [changes.get(name, name) for name in classes]


def listed_classes(names: str | None, file: Path | None) -> list[str] | None:
    """Class names in order from `--classes` or `--classes-file`; None where neither is given.

    Args:
        names: separated by commas, as in a CSV line: a name that holds a comma stands in double quotes.
        file: text with a name per line.

    Raises:
        UserError: both are given, the file cannot be read, or a name is unfit or there twice.
    """
    if names is not None and file is not None:
        raise UserError("--classes and --classes-file: give one of them")
    if names is not None:
        try:
            listed = next(csv.reader([names], skipinitialspace=True, strict=True), [])
        except csv.Error as error:
            raise UserError(f'--classes: {error}; it is read as a CSV line: A,"B, with a comma",C') from error
        where = "--classes"
    elif file is not None:
        try:
            text = read_whole(file).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text: {error}") from error
        listed, where = [line for line in text.splitlines() if line.strip()], str(file)
    else:
        return None
    classes = [class_name(name) for name in listed]
    check_class_names(classes, where)
    return classes


def column_names(names: str | None) -> list[str]:
    """Names of metadata columns from `--metadata A,B`; none where it is not given. Raises UserError where one cannot be."""
    columns = [name.strip() for name in names.split(",")] if names else []
    check_columns(columns, "--metadata")
    return columns


def check_columns(names: Sequence[str], where: str) -> None:
    """Raise UserError unless each may be a metadata column: of word signs, dots and hyphens, no column of ours, none twice.

    There may be `MAX_METADATA` of them.
    """
    if len(names) > MAX_METADATA:
        raise UserError(f"{where}: {len(names)} metadata columns; there may be {MAX_METADATA}")
    for name in names:
        if not COLUMN.fullmatch(name) or name in RESERVED or names.count(name) > 1:
            wanted = f"letters, digits, '_', '.' and '-', distinct, and none of {', '.join(RESERVED)}"
            raise UserError(f"{where}: {name[:50]!r} cannot be a metadata column; names are of {wanted}")


def is_clutter(path: str | PurePosixPath) -> bool:
    """Return True for a relative path of a hidden file, a file manager's, a README or the like, or in such a folder."""
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") or part.casefold() in CLUTTER for part in parts):
        return True
    return bool(parts) and is_document(parts[-1])


def is_document(name: str) -> bool:
    """Return True for the name of a README, a licence or the like."""
    path = PurePosixPath(name.casefold())
    return path.stem in DOCUMENTS and path.suffix in DOCUMENT_SUFFIXES


def is_safe_name(name: str) -> bool:
    """Return True for a name from a file that may become a path: one visible part, without separators and control characters."""
    return (
        0 < len(name.encode(errors="replace")) <= 255
        and not name.startswith(".")
        and not re.search(r"[/\\\x00-\x1f\x7f]", name)
        and name == name.strip()
    )


def is_plain_url(name: str) -> bool:
    """Return True for a URL of one protocol; fsspec's chains (a::b://) could reach and write anything."""
    return URL.fullmatch(name) is not None and "::" not in name
