"""The feature bank: image features that a frozen tower gave, computed once and shared by methods, seeds, shots and runs.

A bank belongs to everything that determines its features: backbone, preprocessing, augmentation and its seed, dataset, split and
precision. View e of a sample is what epoch e shows of it; view 0 is the sample as it is evaluated. On disk a view is one file of
equal records, a sample's features with their checksum, at the sample's place in its split. A record that was never written, or
half written when a process died, fails its checksum and is computed again, and so is one beyond the end of a file that is too
short; so a bank can be filled by any number of processes, stopped at any moment and resumed.

    vipbench bank ls DIR        vipbench bank verify DIR        vipbench bank prune DIR --keep-gib 10
"""

import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import digest_json, read_json, write_json

FACTS, LOCK, VIEWS = "facts.json", ".lock", "view-*.bin"
VERSION = 2
BLOCK = 4096  # bytes, in which file systems give room
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
        facts: everything that determines the features, as JSON, "precision" among it; its digest names the bank.
        samples: N, the number of samples of the split.
        dim: d.
        bound: bytes that all banks of the folder may take together; None for no bound.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any], samples: int, dim: int, bound: int | None = None) -> None:
        facts = {"version": VERSION, "samples": samples, "dim": dim, **facts}
        self.folder, self.samples, self.bound = root / _name(facts), samples, bound
        self.dtype = STORED[facts["precision"]][1]
        self.record = record_type(facts["precision"], dim)
        self._in_use = _use(self.folder, facts)

    def lock(self) -> FileLock:
        """A lock for the process that fills the bank; the operating system releases it when that process dies."""
        return FileLock(self.folder / LOCK)

    def reserve(self, records: Sequence[tuple[int, int]]) -> None:
        """Make room for records (view, row) that are to be written by pruning other banks, those used longest ago first.

        Raises:
            UserError: they do not fit beside the banks in use, this one among them; nothing is pruned then.
        """
        if self.bound is None or not records:
            return
        needed = self._disk_bytes(records)
        in_use = 0
        for bank in list_banks(self.folder.parent, check=False):
            with _unused(bank.folder) as unused:
                in_use += 0 if unused else bank.size
        if in_use + needed > self.bound:
            raise UserError(
                f"{self.folder.parent}: {len(records)} more features take {needed / 2**30:.2f} GiB beside "
                f"{in_use / 2**30:.2f} GiB in use, beyond run.bank_gib; "
                "raise it, cycle through fewer views (train.views=10), or go without (run.bank=false)"
            )
        prune(self.folder.parent, self.bound - needed)

    def _disk_bytes(self, records: Sequence[tuple[int, int]]) -> int:
        """Bytes on disk that records (view, row) take: whole blocks, each counted once, since holes take none."""
        view, row = np.array(records).T
        first, last = row * self.record.itemsize // BLOCK, ((row + 1) * self.record.itemsize - 1) // BLOCK
        blocks = np.minimum(
            first[:, None] + np.arange((last - first).max() + 1), last[:, None]
        )  # [n, blocks of a record]
        in_a_view = self.samples * self.record.itemsize // BLOCK + 1
        return len(np.unique(view[:, None] * in_a_view + blocks)) * BLOCK

    def read(self, view: int, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Read features [n, d] float32 of samples, and a mask [n] bool of those that are stored; the others are zeros."""
        stored = _records(self._path(view), self.record, self.samples)
        records = np.zeros(len(rows), self.record)
        within = rows < len(stored)
        records[within] = stored[rows[within]]
        features = np.ascontiguousarray(records["features"])
        present = _checksums(features) == records["checksum"]
        features[~present] = 0
        return torch.from_numpy(features).view(self.dtype).float(), present

    def write(self, view: int, rows: np.ndarray, features: Tensor) -> None:
        """Store features [n, d] of samples in a view.

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
    """A bank on disk.

    Attributes:
        facts: everything that determines its features; None where facts.json is missing or damaged.
        size: bytes on disk.
        records, damaged: the numbers of whole and of damaged records; 0 where nothing was checked.
        short: names of views that end before their last record, which reads as missing.
        used: when it was last used, in seconds since 1970; 0 where that is not known.
    """

    folder: Path
    facts: dict[str, Any] | None
    size: int
    used: float
    records: int = 0
    damaged: int = 0
    short: tuple[str, ...] = ()


def record_type(precision: str, dim: int) -> np.dtype[Any]:
    """One sample's features and their CRC-32."""
    return np.dtype([("features", STORED[precision][0], dim), ("checksum", np.uint32)])


def list_banks(root: Path, check: bool = True) -> list[BankInfo]:
    """All banks in a folder, the one used longest ago first; with `check` every record is read.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no folder of stored features; give the {root.name or '.bank'} folder beside runs")
    folders = {path.parent for path in root.glob("*/*") if path.name == FACTS or path.match(VIEWS)}
    return sorted((_describe(folder, check) for folder in folders), key=lambda bank: bank.used)


def prune(root: Path, keep_bytes: int) -> list[Path]:
    """Remove the banks used longest ago until the rest take at most `keep_bytes`; banks in use stay."""
    removed, banks = [], list_banks(root, check=False)
    total = sum(bank.size for bank in banks)
    for bank in banks:
        if total <= keep_bytes:
            break
        with _unused(bank.folder) as unused:
            if unused:
                shutil.rmtree(bank.folder)
                removed.append(bank.folder)
                total -= bank.size
    return removed


def _use(folder: Path, facts: Mapping[str, Any]) -> Any:
    """Make a bank's folder and mark it as in use: an open file with a shared lock, which ends with the process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if _read_facts(folder) is None:
            write_json(folder / FACTS, facts)
        try:
            file = (folder / FACTS).open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(folder / FACTS)  # when it was last used, for `prune`
            if os.fstat(file.fileno()).st_ino == (folder / FACTS).stat().st_ino:
                return file
        except FileNotFoundError:
            continue  # it was pruned in this moment


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Lock a bank against use for the length of a block; yields False where a process uses it."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(
                (folder / FACTS).open("ab")
            )  # NFS locks exclusively only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        except (BlockingIOError, FileNotFoundError):  # FileNotFoundError: another process has just removed it
            unused = False
        yield unused


def _read_facts(folder: Path) -> dict[str, Any] | None:
    """A bank's facts, whose digest is its name; None where they are missing or damaged."""
    try:
        facts = read_json(folder / FACTS)
    except UserError:
        return None
    return facts if isinstance(facts, dict) and _name(facts) == folder.name else None


def _name(facts: Mapping[str, Any]) -> str:
    return digest_json(facts)[:16]


def _describe(folder: Path, check: bool) -> BankInfo:
    facts, views = _read_facts(folder), sorted(path for path in folder.glob(VIEWS) if path.is_file())
    size = sum(path.stat().st_blocks * 512 for path in views)
    used = (folder / FACTS).stat().st_mtime if facts else 0.0
    if not check or facts is None or facts.get("version") != VERSION:
        return BankInfo(folder, facts, size, used)
    record = record_type(facts["precision"], facts["dim"])
    records = damaged = 0
    for path in views:
        stored = _records(path, record, facts["samples"])
        written = stored[stored["checksum"] != 0]
        good = int((_checksums(written["features"]) == written["checksum"]).sum())
        records, damaged = records + good, damaged + len(written) - good
    short = tuple(path.name for path in views if path.stat().st_size < facts["samples"] * record.itemsize)
    return BankInfo(folder, facts, size, used, records, damaged, short)


def _records(path: Path, record: np.dtype[Any], samples: int) -> np.ndarray:
    """The whole records of a view's file, mapped into memory, at most one per sample; none where there is no file."""
    count = min(samples, path.stat().st_size // record.itemsize) if path.is_file() else 0
    return np.memmap(path, record, "r", shape=(count,)) if count else np.empty(0, record)


def _checksums(features: np.ndarray) -> np.ndarray:
    """CRC-32 of each row [n] uint32, never 0, which is what a hole in the file reads as."""
    return np.array([zlib.crc32(row.tobytes()) or 1 for row in features], dtype=np.uint32)
