"""A folder with a folder of images for each class, in folders of splits or not."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vipbench.harness.data.dicom import SUFFIXES as DICOM_SUFFIXES
from vipbench.harness.data.images import SUFFIXES
from vipbench.harness.data.importers.base import SPLIT_NAMES, Row, Source, make_source
from vipbench.harness.data.names import CLUTTER, class_name, sorted_classes
from vipbench.harness.errors import UserError

SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,7}")
SHOWN = 5  # kinds of files in a message

Accepts = Callable[[Path], bool]


def read(root: Path, classes: list[str] | None = None, image_root: Path | None = None) -> Source:
    """List ROOT/<split>/<class>/... or ROOT/<class>/... ; classes are sorted by name unless given in order.

    Hidden files, file managers' own and files that are no images are left out, and so is a link to what is listed at its
    own place; the notes count them.
    """
    return list_folder(root, classes, image_root, _is_image)


def list_folder(root: Path, classes: list[str] | None, image_root: Path | None, accepts: Accepts) -> Source:
    """List a folder as `read` does, with the files that `accepts` takes as images."""
    if image_root:
        raise UserError("--image-root: a folder source has its images inside; leave the option out")
    if not os.path.isdir(root):
        raise UserError(f"{root}: not a folder")
    rows, names, ignored, links = [], dict[str, str](), Counter[str](), 0
    try:
        for split, folder in _split_folders(root, accepts):
            for class_folder in _subfolders(folder, accepts):
                name = class_name(class_folder.name)
                names.setdefault(name, str(class_folder))
                found = _ClassFolder(class_folder, root, accepts)
                for file in found.images:
                    rows.append(Row(file.relative_to(root).as_posix(), name, split, None, str(file)))
                ignored, links = ignored + found.ignored, links + found.links
        if not rows:
            raise UserError(f"{root}: no images found{_left_out(root)}; files end in {', '.join(sorted(SUFFIXES))}")
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    count = ignored.total()
    notes = [f"{count} hidden files or files that are no images were ignored: {_listed(ignored)}"] if count else []
    notes += [f"{links} links to files or folders that are listed elsewhere were left out"] if links else []
    return make_source(rows, root, classes or sorted_classes(names), notes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _kind(path: Path) -> str:
    """The kind of a file that is left out: its suffix, where it has one that is no part of a name."""
    if _is_hidden(path.name):
        return "hidden"
    return path.suffix.lower() if SUFFIX.fullmatch(path.suffix.lower()) else "without suffix"


def _listed(kinds: Mapping[str, int]) -> str:
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = [f"{sum(count for _, count in most[SHOWN:])} others"] if len(most) > SHOWN else []
    return ", ".join([f"{count} {kind}" for kind, count in most[:SHOWN]] + more)


def _left_out(root: Path) -> str:
    """The files of a folder without images, by suffix, as a phrase."""
    kinds = Counter(_kind(Path(name)) for _, _, names in os.walk(root) for name in names)
    if not kinds:
        return ""
    dicom = " (--format dicom reads those that are DICOM)" if kinds.keys() & {*DICOM_SUFFIXES, "without suffix"} else ""
    return f" among its files: {_listed(kinds)}{dicom}"


def _split_folders(root: Path, accepts: Accepts) -> list[tuple[str | None, Path]]:
    """The folders that hold class folders, each with its split; the root itself where there are no splits."""
    found = {folder: SPLIT_NAMES.get(folder.name.casefold()) for folder in _subfolders(root, accepts)}
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


def _subfolders(folder: Path, accepts: Accepts) -> list[Path]:
    """Folders in name order, hidden ones left out. Raises UserError where an image lies beside them, in no class."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not entry.name.startswith(".") and accepts(entry):
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
        images: paths in order. ignored: files that are hidden or no images, by kind. links: names that were left out.
    """

    def __init__(self, folder: Path, root: Path, accepts: Accepts) -> None:
        self.root, self.accepts, self.ignored, self.links = _real(root), accepts, Counter[str](), 0
        self._visited: set[Path] = set()
        taken: dict[Path, Path] = {}
        for real, path in sorted(self._files(folder), key=lambda pair: (pair[1].is_symlink(), pair[1])):
            self.links += taken.setdefault(real, path) is not path
        self.images = sorted(taken.values())

    def _files(self, folder: Path) -> Iterator[tuple[Path, Path]]:
        """(resolved path, path) of each image."""
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
                elif _is_hidden(entry.name) or not self.accepts(entry):
                    self.ignored[_kind(entry)] += 1
                else:
                    yield real, entry

    def _is_elsewhere(self, target: Path) -> bool:
        if target in self._visited or self.root.is_relative_to(target):
            return True
        return target.is_relative_to(self.root) and not any(map(_is_hidden, target.relative_to(self.root).parts))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
