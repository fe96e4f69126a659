"""The feature bank: image features that a frozen tower gave, computed once and shared by methods, seeds, shots and runs.

A bank belongs to everything that determines its features: backbone, preprocessing, augmentation and its seed, dataset, split and
precision. View e of a sample is what epoch e shows of it; view 0 is the sample as it is evaluated. On disk a view is one file of
equal records, a sample's features with their checksum, at the sample's place in its split. A record that was never written, or
half written when a process died, fails its checksum and is computed again, so a bank can be filled by any number of processes,
stopped at any moment and resumed.

    vipbench bank ls DIR        vipbench bank verify DIR        vipbench bank prune DIR --keep-gib 10
"""

import fcntl
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from harness.errors import UserError
from harness.files import digest_json, read_json, write_json

FACTS, LOCK = "facts.json", ".lock"
VERSION = 2
# Features are stored, and used, in the precision that they were computed in. NumPy has no bfloat16, so int16 holds its bits.
STORED = {
    "fp32": (np.float32, torch.float32),
    "tf32": (np.float32, torch.float32),
    "fp16": (np.float16, torch.float16),
    "bf16": (np.int16, torch.bfloat16),
}


class FeatureBank:
    """Features of the samples of one split. While it is in use it is not pruned.

    Args:
        root: the folder of all banks.
        facts: what determines the features, as JSON, "precision" among it; it names the bank.
        samples: N, how many samples the split has.
        dim: d.
        bound: bytes that all banks of the folder may take together; None for no bound.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any], samples: int, dim: int, bound: int | None = None) -> None:
        facts = {"version": VERSION, "samples": samples, "dim": dim, **facts}
        self.folder, self.samples, self.bound = root / digest_json(facts)[:16], samples, bound
        self.dtype = STORED[facts["precision"]][1]
        self.record = record_type(facts["precision"], dim)
        self._in_use = _use(self.folder, facts)

    def lock(self) -> FileLock:
        """Held by the process that fills the bank; the operating system releases it when that process dies."""
        return FileLock(self.folder / LOCK)

    def reserve(self, views: Sequence[int]) -> None:
        """Make room for views that are not there yet by pruning other banks, those used longest ago first.

        Raises:
            UserError: the bound does not allow for them.
        """
        if self.bound is None:
            return
        missing = sum(not self._path(view).is_file() for view in views)
        needed = missing * self.samples * self.record.itemsize
        if missing:
            prune(self.folder.parent, max(0, self.bound - needed))
        total = sum(bank.size for bank in list_banks(self.folder.parent, check=False))
        if total + needed > self.bound:
            raise UserError(
                f"{self.folder.parent}: {missing} more views take {needed / 2**30:.2f} GiB, beyond run.bank_gib; "
                "raise it, cycle through fewer views (train.views=10), or go without (run.bank=false)"
            )

    def read(self, view: int, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Features [n, d] float32 of samples, and whether each is there [n] bool (where not, its features are zeros)."""
        path = self._path(view)
        if not path.is_file():
            return torch.zeros(len(rows), *self.record["features"].shape), np.zeros(len(rows), bool)
        records = np.memmap(path, self.record, "r", shape=(self.samples,))[rows]
        features = np.ascontiguousarray(records["features"])
        present = _checksums(features) == records["checksum"]
        features[~present] = 0
        return torch.from_numpy(features).view(self.dtype).float(), present

    def write(self, view: int, rows: np.ndarray, features: Tensor) -> None:
        """Put features [n, d] of samples into a view.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        records = np.empty(len(rows), self.record)
        stored = features.to("cpu", self.dtype).contiguous()
        records["features"] = (stored.view(torch.int16) if self.dtype == torch.bfloat16 else stored).numpy()
        records["checksum"] = _checksums(records["features"])
        try:
            with os.fdopen(os.open(self._path(view), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                os.ftruncate(file.fileno(), self.samples * self.record.itemsize)  # holes take no room
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


def record_type(precision: str, dim: int) -> np.dtype[Any]:
    """One sample's features and their CRC-32."""
    return np.dtype([("features", STORED[precision][0], dim), ("checksum", np.uint32)])


def list_banks(root: Path, check: bool = True) -> list[BankInfo]:
    """All banks in a folder, the one used longest ago first; with `check` every record is read."""
    found = sorted(root.glob(f"*/{FACTS}"), key=lambda path: path.stat().st_mtime)
    return [_describe(path.parent, check) for path in found]


def prune(root: Path, keep_bytes: int) -> list[Path]:
    """Remove the banks used longest ago until the rest take at most `keep_bytes`; banks in use stay."""
    removed, banks = [], list_banks(root, check=False)
    total = sum(bank.size for bank in banks)
    for bank in banks:
        if total <= keep_bytes:
            break
        with (bank.folder / FACTS).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(bank.folder)
        removed.append(bank.folder)
        total -= bank.size
    return removed


def _use(folder: Path, facts: Mapping[str, Any]) -> Any:
    """Make a bank's folder and mark it as in use: an open file with a shared lock, which ends with the process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FACTS).is_file():
            write_json(folder / FACTS, facts)
        try:
            file = (folder / FACTS).open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(folder / FACTS)  # when it was last used, for `prune`
            if os.fstat(file.fileno()).st_ino == (folder / FACTS).stat().st_ino:
                return file
        except FileNotFoundError:
            continue  # it was pruned in this moment


def _describe(folder: Path, check: bool) -> BankInfo:
    facts = read_json(folder / FACTS)
    record = record_type(facts["precision"], facts["dim"])
    size = records = damaged = 0
    for path in sorted(folder.glob("view-*.bin")):
        size += path.stat().st_blocks * 512
        if check:
            content = np.memmap(path, record, "r")
            written = content[content["checksum"] != 0]
            good = int((_checksums(written["features"]) == written["checksum"]).sum())
            records, damaged = records + good, damaged + len(written) - good
    return BankInfo(folder, facts, size, records, damaged)


def _checksums(features: np.ndarray) -> np.ndarray:
    """CRC-32 of each row [n] uint32, never 0, which is what a hole in the file reads as."""
    return np.array([zlib.crc32(row.tobytes()) or 1 for row in features], dtype=np.uint32)
