"""Importers: a file for each kind of source, found by its name, that lists labelled images without opening one.

An importer is a function `read(source, classes, image_root) -> Source`; `vipbench prepare --format NAME` calls the one in
NAME.py, and `vipbench.harness.data.shards.write_dataset` checks and writes the images that it lists. One that has further
arguments gets the options of those names.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vipbench.harness.errors import UserError, did_you_mean

if TYPE_CHECKING:  # slow to import, and the command line needs the names only
    from vipbench.harness.data.importers.base import Source


class Importer(Protocol):
    """A function that lists the images of a source.

    Args:
        source: a file or folder.
        classes: names in the order of their labels; None: the importer's own order.
        image_root: the folder that paths in the source start from; None: the source's own.

    Raises:
        UserError: the source cannot be read or understood.
    """

    def __call__(self, source: Path, classes: list[str] | None = None, image_root: Path | None = None) -> "Source": ...


def formats() -> list[str]:
    """Names of all importers, as `--format` takes them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name != "base")


def importer(format: str) -> Importer:
    """The importer of a format. Raises UserError where there is none of this name."""
    if format not in formats():
        raise UserError(f"--format: there is no importer {format!r}; {did_you_mean(format, formats())}")
    return cast(Importer, importlib.import_module(f"{__name__}.{format.replace('-', '_')}").read)
