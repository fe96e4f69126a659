"""Decode every image of a source once, in order, on any number of processes; good images wait in a spool file."""

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from vipbench.harness.data.images import BadImage, Normalised, normalise_file
from vipbench.harness.data.importers.base import Record
from vipbench.harness.errors import UserError
from vipbench.harness.system.processes import end_with_parent
from vipbench.harness.system.progress import Progress

AHEAD = 4  # images in flight per process, which bounds memory


@dataclass(frozen=True)
class Checked:
    """A good image: where its bytes are in the spool, and the digest of its pixels."""

    record: Record
    extension: str
    pixels: str
    offset: int
    size: int


def check_images(
    records: list[Record], spool: BinaryIO, skip_bad: bool, workers: int
) -> tuple[list[Checked], list[str]]:
    """Decode and normalise images into a spool; returns the good ones in order and notes on what was skipped or changed.

    Raises:
        UserError: an image cannot be used, and `skip_bad` is false; or none can.
    """
    checked: list[Checked] = []
    skipped: list[str] = []
    changes: Counter[str] = Counter()
    with Progress("check images", len(records), "images") as progress:
        for record, image in zip(records, _normalise_all([record.path for record in records], workers), strict=True):
            if isinstance(image, Normalised):
                offset = spool.tell()
                spool.write(image.data)
                checked.append(Checked(record, image.extension, image.pixels, offset, len(image.data)))
                changes.update(image.changes)
            elif skip_bad:
                skipped.append(f"skipped {record.key} ({record.path.name}): {image}")
            else:
                raise UserError(f"{record.path}: {image} (--on-error skip leaves out such images)")
            progress.advance(note=f"{len(skipped)} skipped" if skipped else None)
    if not checked:
        raise UserError(f"none of the {len(records)} images can be used; the first: {skipped[0]}")
    return checked, [*(f"{count} images {change}" for change, count in sorted(changes.items())), *skipped]


def _normalise_all(paths: list[Path], workers: int) -> Iterator[Normalised | BadImage]:
    """Images in the order of their paths, at most `AHEAD` per process in memory."""
    if workers <= 1:
        yield from map(_try_normalise, paths)
        return
    pending: deque[Future[Normalised | BadImage]] = deque()
    # Spawned, since forking a process that has threads can hang it.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        try:
            for path in paths:
                pending.append(pool.submit(_try_normalise, path))
                if len(pending) >= AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that decodes images was killed, perhaps for memory; try --workers 1") from error


def _try_normalise(path: Path) -> Normalised | BadImage:
    try:
        return normalise_file(path)
    except BadImage as error:
        return error
