"""Read a prepared dataset: any sample by its position, from any thread or process, without unpacking shards."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from harness.data.index import read_index
from harness.data.shards import DatasetInfo
from harness.errors import UserError

MAX_OPEN_SHARDS = 64  # per process


@dataclass(frozen=True)
class Shard:
    """A shard's file. The checksum tells it from another one written to the same place later."""

    path: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a split, in the order of their keys unless selected in another.

    Attributes:
        keys: [N] str, the samples' ids.
        labels: [N] int64.
        patients: [N] object: pseudonym or None.
        shards: [N] int32, positions in `files`.
        offsets, sizes: [N] int64, where the image's bytes are in its shard.
        digests: [N] bytes, SHA-256 (hex) of the image's bytes.
        files: the split's shards.
    """

    keys: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    files: tuple[Shard, ...]

    @classmethod
    def from_indexes(cls, files: Sequence[Shard], tables: Sequence[pa.Table]) -> Self:
        """Samples of the shards that the index tables describe."""
        table = pa.concat_tables(tables)
        shards = np.repeat(np.arange(len(tables), dtype=np.int32), [len(part) for part in tables])
        samples = cls(
            keys=np.array(table["key"].to_pylist(), dtype=np.str_),
            labels=table["label"].to_numpy().astype(np.int64),
            patients=np.array(table["patient"].to_pylist(), dtype=object),
            shards=shards,
            offsets=table["offset"].to_numpy(),
            sizes=table["size"].to_numpy(),
            digests=np.array(table["sha256"].to_pylist(), dtype=np.bytes_),
            files=tuple(files),
        )
        return samples.select(np.argsort(samples.keys))

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, positions: np.ndarray | Sequence[int]) -> Self:
        """The samples at these positions (or where a [N] bool mask is true), in this order."""
        chosen = np.asarray(positions) if len(positions) else np.empty(0, dtype=np.int64)
        names = ("keys", "labels", "patients", "shards", "offsets", "sizes", "digests")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def image_bytes(self, position: int) -> bytes:
        """The image file's bytes. Raises UserError where the shard is missing or the bytes are not those of the index."""
        shard, offset = self.files[self.shards[position]], int(self.offsets[position])
        try:
            file = _open(shard)  # held until the bytes are here, so that it stays open
            data = os.pread(file.descriptor, int(self.sizes[position]), offset)
        except OSError as error:
            raise UserError(f"{shard.path}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest().encode() != self.digests[position]:
            raise UserError(
                f"{shard.path}: sample {str(self.keys[position])!r} at byte {offset} is damaged (checksum); "
                "`vipbench inspect` checks the whole dataset"
            )
        return data

    def image(self, position: int) -> Image.Image:
        """The image, decoded, RGB."""
        return Image.open(io.BytesIO(self.image_bytes(position)), formats=("JPEG", "PNG")).convert("RGB")


class Dataset:
    """A folder that `vipbench prepare` wrote. Raises UserError where it is none.

    Attributes:
        info: what dataset.json says.
        classes: names in the order of their labels.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.info = DatasetInfo.load(self.path)
        self.classes = self.info.classes

    def has(self, split: str) -> bool:
        return split in self.info.splits

    def split(self, name: str) -> Samples:
        """All samples of a split. Raises UserError where the dataset has no such split."""
        if not self.has(name):
            raise UserError(f"{self.path}: no split {name!r}; it has {', '.join(self.info.splits)}")
        shards = self.info.splits[name].shards
        tables = [read_index(self.path / shard.file) for shard in shards]
        for shard, table in zip(shards, tables, strict=True):
            if len(table) != shard.samples:
                raise UserError(f"{self.path / shard.file}: the index lists {len(table)} samples, not {shard.samples}")
        return Samples.from_indexes([Shard(str(self.path / shard.file), shard.sha256) for shard in shards], tables)


class ImageDataset(TorchDataset[tuple[Tensor, int, int]]):
    """Samples as torch wants them: (transformed image, label, position)."""

    def __init__(self, samples: Samples, transform: Callable[[Image.Image, str], Tensor]) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        image, key = self.samples.image(position), str(self.samples.keys[position])
        return self.transform(image, key), int(self.samples.labels[position]), position


class _OpenFile:
    """A file descriptor that is closed with the last reference to it, so never under a thread that reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open(shard: Shard) -> _OpenFile:
    return _OpenFile(shard.path)


# A forked process opens its own files, since on some network file systems a shared handle is not safe.
os.register_at_fork(after_in_child=_open.cache_clear)
