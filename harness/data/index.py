"""The index beside a shard: one row per sample that says where its image is, so that any sample can be read alone."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.data.remote import Stream, read_bytes
from harness.errors import UserError
from harness.files import atomic_path

IMAGE_EXTENSIONS = ("jpg", "png")
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("patient", pa.string()),
        pa.field("extension", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the image's first byte in the shard
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # hex, of the image's bytes
    ]
)


def index_path(shard: str | Path) -> Path:
    """Where a shard's index is: train-000000.tar -> train-000000.index.parquet."""
    return Path(shard).with_suffix(".index.parquet")


def read_members(file: "HashedFile") -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files in a tar and their content, in one pass over all of it.

    Raises:
        ValueError: not an uncompressed tar, or cut off (says at which byte).
    """
    source: Any = file
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield member, content.read()
    except tarfile.TarError as error:
        raise ValueError(f"not a whole tar: {error} (at byte {file.position})") from error
    while file.read(1 << 20):
        continue
    if file.last != bytes(tarfile.BLOCKSIZE):  # zeros end a tar
        raise ValueError(f"it ends at byte {file.position} without the mark of a tar's end: it was cut off")


class HashedFile:
    """A file that is read once from its start.

    Attributes:
        position: bytes read. last: the last 512 of them. digest: their SHA-256 so far.
    """

    def __init__(self, file: Stream) -> None:
        self.file, self.position, self.last, self.digest = file, 0, b"", hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        self.digest.update(data)
        return data


def index_shard(shard: Path) -> pa.Table:
    """Read a shard's headers, labels and images, and describe each sample: a table of `SCHEMA`, in the shard's order.

    Raises:
        UserError: not a tar of pairs of an image and a JSON member, or cut off.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        with shard.open("rb") as file:
            for member, data in read_members(HashedFile(file)):
                key, _, extension = member.name.rpartition(".")
                row = rows.setdefault(key, {"key": key, "patient": None})
                if extension == "json":
                    meta = json.loads(data)
                    row |= {"label": meta["label"], "patient": meta.get("patient")}
                elif extension in IMAGE_EXTENSIONS:
                    digest = hashlib.sha256(data).hexdigest()
                    row |= {"extension": extension, "offset": member.offset_data, "size": member.size, "sha256": digest}
        for row in rows.values():
            if row.keys() != set(SCHEMA.names):
                raise ValueError(f"sample {row['key']!r} has no {'image' if 'label' in row else 'label'}")
        return pa.Table.from_pylist(list(rows.values()), SCHEMA).combine_chunks()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shard}: not a whole shard of images with JSON: {error}") from error


def write_index(path: Path, table: pa.Table) -> None:
    """Write a shard's index."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_index(path: str | Path) -> pa.Table:
    """Read an index, from a file or a URL. Raises UserError where it is missing or is no index."""
    content = read_bytes(path)
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from error
    if table.schema.names != SCHEMA.names:
        raise UserError(f"{path}: its columns are {table.schema.names}; an index has {SCHEMA.names}")
    return table.cast(SCHEMA).combine_chunks()
