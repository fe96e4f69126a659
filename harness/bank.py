"""The feature bank: image features that a frozen tower gave, computed once and shared by methods, seeds, shots and runs.

A bank belongs to everything that determines its features: backbone, preprocessing, augmentation and its seed, dataset, split and
precision. View e of a sample is what epoch e shows of it; view 0 is the sample as it is evaluated. On disk a view is one file of
equal records, a sample's features with their checksum, at the sample's place in its split. A record that was never written, or
half written when a process died, fails its checksum and is computed again, so a bank can be filled by any number of processes,
stopped at any moment and resumed.

    vipbench bank ls DIR        vipbench bank verify DIR        vipbench bank prune DIR --keep-gib 10
"""

import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from harness.errors import UserError
from harness.files import digest_json, read_json, write_json

FACTS, LOCK = "facts.json", ".lock"
EVALUATION = 0  # the view that is not augmented
VERSION = 1


class FeatureBank:
    """Features of the samples of one split.

    Args:
        root: the folder of all banks.
        facts: what determines the features, as JSON; it names the bank.
        keys: [N] str, the split's sample ids in order.
        dim: d.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any], keys: np.ndarray, dim: int) -> None:
        facts = {"version": VERSION, "samples": len(keys), "dim": dim, **facts}
        self.folder, self.keys = root / digest_json(facts)[:16], keys
        self.record = np.dtype([("features", np.float32, dim), ("checksum", np.uint32)])
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FACTS).is_file():
            write_json(self.folder / FACTS, facts)
        os.utime(self.folder / FACTS)  # when it was last used, for `prune`

    def lock(self) -> FileLock:
        """Held by the process that fills the bank; the operating system releases it when that process dies."""
        return FileLock(self.folder / LOCK)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Places [n] of samples in the split."""
        rows = np.searchsorted(self.keys, keys)
        assert (self.keys[rows] == keys).all(), "a sample is not of this split"
        return rows

    def read(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, d] float32 of samples, and whether each is there [n] bool (where not, its features mean nothing)."""
        path = self._path(view)
        if not path.is_file():
            return np.zeros((len(rows), *self.record["features"].shape), np.float32), np.zeros(len(rows), bool)
        records = np.memmap(path, self.record, "r", shape=(len(self.keys),))[rows]
        features = np.ascontiguousarray(records["features"])
        return features, _checksums(features) == records["checksum"]

    def write(self, view: int, rows: np.ndarray, features: np.ndarray) -> None:
        """Put features [n, d] of samples into a view.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        records = np.empty(len(rows), self.record)
        records["features"], records["checksum"] = features, _checksums(features.astype(np.float32))
        try:
            with os.fdopen(os.open(self._path(view), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                os.ftruncate(file.fileno(), len(self.keys) * self.record.itemsize)  # holes take no room
                for row, record in zip(rows, records, strict=True):
                    os.pwrite(file.fileno(), record.tobytes(), int(row) * self.record.itemsize)
        except OSError as error:
            raise UserError(
                f"{self.folder}: features cannot be stored: {error.strerror}; run.bank=false goes without"
            ) from error

    def _path(self, view: int) -> Path:
        return self.folder / f"view-{view:06d}.bin"


@dataclass(frozen=True)
class BankInfo:
    """A bank on disk: what it holds, how much room it takes (bytes), how many records are there, and the damaged ones."""

    folder: Path
    facts: dict[str, Any]
    size: int
    records: int
    damaged: int


def list_banks(root: Path) -> list[BankInfo]:
    """All banks in a folder, the one used longest ago first; every record is checked."""
    found = sorted(root.glob(f"*/{FACTS}"), key=lambda path: path.stat().st_mtime)
    return [_describe(path.parent) for path in found]


def prune(root: Path, keep_bytes: int) -> list[Path]:
    """Remove the banks used longest ago until the rest take at most `keep_bytes`; banks that are being filled stay."""
    removed, banks = [], list_banks(root)
    total = sum(bank.size for bank in banks)
    for bank in banks:
        if total <= keep_bytes:
            break
        with FileLock(bank.folder / LOCK, timeout=0):
            shutil.rmtree(bank.folder)
        removed.append(bank.folder)
        total -= bank.size
    return removed


def _describe(folder: Path) -> BankInfo:
    facts = read_json(folder / FACTS)
    record = np.dtype([("features", np.float32, facts["dim"]), ("checksum", np.uint32)])
    size = records = damaged = 0
    for path in sorted(folder.glob("view-*.bin")):
        content = np.memmap(path, record, "r")
        written = content[content["checksum"] != 0]
        good = int((_checksums(written["features"]) == written["checksum"]).sum())
        size, records, damaged = size + path.stat().st_blocks * 512, records + good, damaged + len(written) - good
    return BankInfo(folder, facts, size, records, damaged)


def _checksums(features: np.ndarray) -> np.ndarray:
    """CRC-32 of each row [n] uint32, never 0, which is what a hole in the file reads as."""
    return np.array([zlib.crc32(row.tobytes()) or 1 for row in features], dtype=np.uint32)
