"""Images that look alike, by a perceptual hash: copies that were resized, compressed again or changed in brightness.

The hash has a bit for each of the 256 lowest frequencies of a small grey version's cosine transform: 1 where it is above their
median (as pHash does with 64 bits: Zauner 2010, Implementation and benchmarking of perceptual image hash functions). Every image
is compared with every other.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from vipbench.harness.data.reader import Dataset
from vipbench.harness.system.files import output_errors, write_text
from vipbench.harness.system.progress import Progress

SIZE, LOWEST = 64, 16  # pixels of the small version, frequencies per axis
BITS = LOWEST * LOWEST
DISTANCE = 24  # bits of 256 in which copies may differ
COMPARED = 1 << 20  # pairs at a time, which bounds memory: 32 bytes each
COLUMNS = ("distance", "split", "class", "sample", "other split", "other class", "other sample")


class Pair(NamedTuple):
    """Two alike images: their positions and the number of bits in which their hashes differ."""

    first: int
    second: int
    distance: int


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """The hash of an image [H, W, 3] uint8: [32] uint8."""
    grey = Image.fromarray(pixels).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, dtype=np.float64), norm="ortho")[:LOWEST, :LOWEST].ravel()
    low[0] = 0  # the mean
    return np.packbits(low > np.median(low))


def alike(hashes: np.ndarray, distance: int) -> Iterator[Pair]:
    """Pairs of hashes [N, 32] uint8 that differ in at most `distance` bits."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    rows_at_a_time = max(1, COMPARED // max(1, len(words)))
    with Progress("compare images", len(words), "images") as progress:
        for start in range(0, len(words), rows_at_a_time):
            block = words[start : start + rows_at_a_time]
            bits = np.bitwise_count(block[:, None] ^ words[None, start:]).sum(axis=-1, dtype=np.uint16)
            rows, columns = np.nonzero(bits <= distance)
            for row, column in zip(rows[columns > rows].tolist(), columns[columns > rows].tolist(), strict=True):
                yield Pair(start + row, start + column, int(bits[row, column]))
            progress.advance(len(block))


def find(dataset: Dataset, report: Path, distance: int = DISTANCE) -> str:
    """Write a CSV line for each pair of alike images of a dataset, nearest first, and return a summary.

    Raises:
        UserError: an image is damaged, or the report cannot be written.
    """
    samples = [
        (split, dataset.split(split), position)
        for split in dataset.info.splits
        for position in range(len(dataset.split(split)))
    ]
    hashes = np.empty((len(samples), BITS // 8), dtype=np.uint8)
    with Progress("hash images", len(samples), "images") as progress:
        for number, (_, members, position) in enumerate(samples):
            hashes[number] = perceptual_hash(members.pixels(position))
            progress.advance()
    pairs = sorted(alike(hashes, distance), key=lambda pair: (pair.distance, pair))

    def described(number: int) -> tuple[str, str, str]:
        split, members, position = samples[number]
        return split, dataset.classes[int(members.labels[position])], members.key(position)

    rows = [(pair.distance, *described(pair.first), *described(pair.second)) for pair in pairs]
    with output_errors(report):
        write_text(report, _table(rows))
    across, between = (sum(row[place] != row[place + 3] for row in rows) for place in (1, 2))
    return (
        f"{len(rows)} pairs of images that look alike (at most {distance} of {BITS} bits differ): {across} across splits, "
        f"{between} of two classes; {report} lists them"
    )


def _table(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    return text.getvalue()
