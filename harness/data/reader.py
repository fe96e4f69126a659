"""Read a dataset: any sample by its position, from any thread or process, without unpacking shards.

Shards lie in a local folder or at any URL that fsspec opens (harness/data/remote.py).
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vipbench.harness.data.decode import Picture
from vipbench.harness.data.digest import content_digest
from vipbench.harness.data.images import BadImage
from vipbench.harness.data.index import SCHEMA, check_index, read_index
from vipbench.harness.data.info import INFO, DatasetInfo, SplitInfo
from vipbench.harness.data.remote import ShardCache, is_url, join
from vipbench.harness.errors import UserError

MAX_OPEN_SHARDS = 16  # per process; a copy that left the cache takes room as long as it is open

T = TypeVar("T")


class DamagedSample(UserError):
    """A sample whose bytes are not those of the index, are missing, or are no image; the rest of its shard may be good."""

    def __init__(self, key: str, shard: str, offset: int, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r} at byte {offset} is damaged: {reason}")
        self.key, self.shard, self.offset, self.reason = key, shard, offset, reason

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, int, str]]:
        return type(self), (self.key, self.shard, self.offset, self.reason)


@dataclass(frozen=True)
class Shard:
    """A shard's file or URL. The checksum tells it from another one written to the same place later."""

    path: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a split, in the order of their keys unless selected in another. Compact, and flat in loader processes: there
    is no Python object per sample, whose count of references would be written to.

    Attributes:
        names: [N] Arrow strings, the samples' ids.
        labels: [N] int64.
        rows: [N] int64, each sample's place in its whole split.
        patient_codes: [N] int32, positions in `patient_names`; -1 where unknown.
        shards: [N] int32, positions in `files`.
        offsets, sizes: [N] int64, where the image's bytes are in its shard.
        digests: [N, 32] uint8, SHA-256 of the image's bytes.
        files: the split's shards.
        split_size: how many samples the whole split has.
        metadata: columns of the index beside these, by name: [N] Arrow dictionaries of text, with nulls where unknown.
    """

    names: pa.Array
    labels: np.ndarray
    rows: np.ndarray
    patient_codes: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    files: tuple[Shard, ...]
    patient_names: tuple[str, ...]
    split_size: int
    metadata: Mapping[str, pa.Array] = field(default_factory=dict)

    @classmethod
    def from_indexes(cls, files: Sequence[Shard], tables: Sequence[pa.Table]) -> Self:
        """Samples of the shards that the index tables describe."""
        table = pa.concat_tables(tables, promote_options="default")  # a shard may lack a column of metadata
        patients = table["patient"].combine_chunks().dictionary_encode()
        patients = patients.combine_chunks() if isinstance(patients, pa.ChunkedArray) else patients
        samples = cls(
            names=_array(table["key"].cast(pa.large_string())),
            labels=table["label"].to_numpy().astype(np.int64),
            rows=np.arange(len(table)),
            patient_codes=pc.fill_null(patients.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32),
            shards=np.repeat(np.arange(len(tables), dtype=np.int32), [len(part) for part in tables]),
            offsets=table["offset"].to_numpy(),
            sizes=table["size"].to_numpy(),
            digests=_digests(table["sha256"]),
            files=tuple(files),
            patient_names=tuple(patients.dictionary.to_pylist()),
            split_size=len(table),
            metadata={name: _array(table[name].dictionary_encode()) for name in table.column_names[len(SCHEMA) :]},
        )
        ordered = samples.select(pc.array_sort_indices(samples.names).to_numpy())
        return replace(ordered, rows=np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, position: int) -> str:
        """The id of one sample."""
        return str(self.names[int(position)].as_py())

    @property
    def keys(self) -> np.ndarray:
        """[N] str, all ids; made anew each time, four bytes a character."""
        return np.array(self.names.to_pylist(), dtype=np.str_)

    @property
    def patients(self) -> list[str | None]:
        """[N] pseudonyms, None where unknown."""
        return [self.patient_names[code] if code >= 0 else None for code in self.patient_codes.tolist()]

    @property
    def groups(self) -> dict[str, list[str | None]]:
        """[N] values of what samples may be grouped by: "patient" where any is known, and each column of metadata."""
        patients = {"patient": self.patients} if (self.patient_codes >= 0).any() else {}
        return patients | {name: column.to_pylist() for name, column in self.metadata.items()}

    def select(self, positions: np.ndarray | Sequence[int]) -> Self:
        """The samples at these positions (or where a [N] bool mask is true), in this order."""
        chosen = np.asarray(positions) if len(positions) else np.empty(0, dtype=np.int64)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        columns = ("labels", "rows", "patient_codes", "shards", "offsets", "sizes", "digests")
        parts = {name: getattr(self, name)[chosen] for name in columns}
        taken = pa.array(chosen)
        metadata = {name: column.take(taken) for name, column in self.metadata.items()}
        return replace(self, names=self.names.take(taken), metadata=metadata, **parts)

    def image_bytes(self, position: int) -> bytes:
        """The image file's bytes.

        Raises:
            DamagedSample: they are not those of the index.
            UserError: the shard is missing or cannot be reached.
        """
        shard, offset, size = self.files[self.shards[position]], int(self.offsets[position]), int(self.sizes[position])
        try:
            file = _open(shard)  # held until the bytes are here, so that it stays open
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{shard.path}: cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise self._damaged(position, f"the shard ends after {len(data)} of its {size} bytes")
        if hashlib.sha256(data).digest() != self.digests[position].tobytes():
            raise self._damaged(position, "its checksum is wrong (`vipbench inspect` checks the whole dataset)")
        return data

    def show(self, position: int, view: Callable[[Picture], T]) -> T:
        """Apply a view to the decoded image. Raises as `image_bytes` does, and DamagedSample where it cannot be decoded."""
        data = self.image_bytes(position)
        try:
            return view(Picture(data))
        except BadImage as error:
            raise self._damaged(position, str(error)) from error

    def pixels(self, position: int) -> np.ndarray:
        """The image, decoded: [H, W, 3] uint8 RGB. Raises as `show` does."""
        return self.show(position, Picture.pixels)

    def image(self, position: int) -> Image.Image:
        """The image, decoded, RGB. Raises as `show` does."""
        return Image.fromarray(self.pixels(position))

    def _damaged(self, position: int, reason: str) -> DamagedSample:
        shard, offset = self.files[self.shards[position]].path, int(self.offsets[position])
        return DamagedSample(self.key(position), shard, offset, reason)


class Dataset:
    """A folder or URL that `vipbench prepare` or `vipbench index` wrote, its indexes read and checked against its digest.

    Attributes:
        info: the content of dataset.json.
        classes: names in the order of their labels.

    Raises:
        UserError: it is no dataset, or its classes, splits, keys, labels or image checksums are not those it was written with.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.info = DatasetInfo.load(path)
        self.classes = self.info.classes
        self._splits = {name: self._read(name, split) for name, split in self.info.splits.items()}
        if content_digest(self.classes, self._splits) != self.info.digest:
            raise UserError(
                f"{join(path, INFO)}: the digest is not that of its classes, labels and images; something was changed since it "
                "was written, so prepare or index the data again"
            )

    def has(self, split: str) -> bool:
        return split in self._splits

    def split(self, name: str) -> Samples:
        """All samples of a split. Raises UserError where the dataset has no such split."""
        if not self.has(name):
            raise UserError(f"{self.path}: no split {name!r}; it has {', '.join(self.info.splits)}")
        return self._splits[name]

    def _read(self, name: str, split: SplitInfo) -> Samples:
        files, tables = [], []
        for shard in split.shards:
            path = join(self.path, shard.index_file)
            files.append(Shard(join(self.path, shard.file), shard.sha256))
            tables.append(check_index(read_index(path), path, shard.samples, len(self.classes)))
        samples = Samples.from_indexes(files, tables)
        if len(samples) > 1 and pc.any(pc.equal(samples.names[1:], samples.names[:-1])).as_py():
            raise UserError(f"{join(self.path, INFO)}: two samples of {name} have one key; index the data again")
        counts = np.bincount(samples.labels, minlength=len(self.classes)).tolist()
        if counts != [split.counts[label] for label in self.classes]:
            raise UserError(f"{join(self.path, INFO)}: counts of {name} are not those of its shards")
        return samples


class _OpenFile:
    """A file descriptor that is closed with the last reference to it, so never under a thread that reads."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open(shard: Shard) -> _OpenFile:
    if is_url(shard.path):
        return _OpenFile(ShardCache.from_environment().open(shard.path, shard.sha256))
    # A pipe is an error at the first read then, and is not waited for.
    return _OpenFile(os.open(shard.path, os.O_RDONLY | os.O_NONBLOCK))


# A forked process opens its own files, since on some network file systems a shared handle is not safe.
os.register_at_fork(after_in_child=_open.cache_clear)


def _array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _digests(column: pa.ChunkedArray) -> np.ndarray:
    """Hex strings of 64 digits -> [N, 32] uint8, without a Python object for each."""
    hexadecimal = _array(column.cast(pa.large_string()))
    offset = hexadecimal.offset * 64
    digits = np.frombuffer(hexadecimal.buffers()[2] or b"", np.uint8)[offset : offset + 64 * len(column)]
    values = np.where(digits >= ord("a"), digits - ord("a") + 10, digits - ord("0")).astype(np.uint8).reshape(-1, 2)
    return (values[:, 0] << 4 | values[:, 1]).reshape(len(column), 32)
