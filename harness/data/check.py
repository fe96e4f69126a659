"""Decode every image of a source once, in order, on any number of processes; good images wait in a spool file."""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import BinaryIO

from vipbench.harness.data.images import BadImage, Normalised, StoredImage, normalise
from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.errors import UserError
from vipbench.harness.system.processes import end_with_parent
from vipbench.harness.system.progress import Progress

log = logging.getLogger(__name__)

AHEAD = 4  # images in flight per process, which bounds memory


@dataclass(frozen=True)
class Checked:
    """A good image: where its bytes are in the spool, and the digest of its pixels."""

    record: Record
    extension: str
    pixels: str
    offset: int
    size: int


def check_images(source: Source, spool: BinaryIO, skip_bad: bool, workers: int) -> tuple[list[Checked], list[str]]:
    """Decode and normalise images into a spool; returns the good ones in order and notes on what was skipped or changed.

    Raises:
        UserError: an image cannot be used, and `skip_bad` is false; or none can.
    """
    checked: list[Checked] = []
    skipped: list[str] = []
    changes: Counter[str] = Counter()
    with Progress("check images", len(source.records), "images") as progress:
        for record, image in zip(source.records, _normalise_all(source.read_images(), workers), strict=True):
            if isinstance(image, Normalised):
                offset = spool.tell()
                spool.write(image.data)
                checked.append(Checked(record, image.extension, image.pixels, offset, len(image.data)))
                changes.update(image.changes)
            elif skip_bad:
                skipped.append(_skipped(record, image, source.pseudonymous))
            else:
                raise UserError(f"{record.place}: {image} (--on-error skip leaves out such images)")
            progress.advance(note=f"{len(skipped)} skipped" if skipped else None)
    if not checked:
        raise UserError(f"none of the {len(source.records)} images can be used; the first: {skipped[0]}")
    return checked, [*(f"{count} images {change}" for change, count in sorted(changes.items())), *skipped]


def _skipped(record: Record, reason: BadImage, pseudonymous: bool) -> str:
    """A note, which is stored; of a source whose names may identify somebody the file and the reason are only logged."""
    if pseudonymous:
        log.warning("%s: skipped, as %s: %s", record.place, record.key, reason)
        return f"skipped {record.key}"
    return f"skipped {record.key} ({record.inside or record.path.name}): {reason}"


def _normalise_all(images: Iterable[StoredImage], workers: int) -> Iterator[Normalised | BadImage]:
    """Images in their order, at most `AHEAD` per process in memory."""
    if workers <= 1:
        yield from map(_try_normalise, images)
        return
    pending: deque[Future[Normalised | BadImage]] = deque()
    # Spawned, since forking a process that has threads can hang it.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        try:
            for image in images:
                pending.append(pool.submit(_try_normalise, image))
                if len(pending) >= AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that decodes images was killed, perhaps for memory; try --workers 1") from error


def _try_normalise(image: StoredImage) -> Normalised | BadImage:
    try:
        return normalise(image.read())
    except BadImage as error:
        return error
