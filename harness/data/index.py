"""The index beside a shard: one row per sample that says where its image is, so that any sample can be read alone."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


def index_path(shard: Path) -> Path:
    """Where a shard's index is: train-000000.tar -> train-000000.index.parquet."""
    return shard.with_suffix(".index.parquet")


def index_shard(shard: Path) -> pa.Table:
    """Read a shard's headers, labels and images, and describe each sample: a table of `SCHEMA`, in the shard's order.

    Raises:
        UserError: not a tar of pairs of an image and a JSON member, or cut off.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None, "a shard holds files only"
                key, _, extension = member.name.rpartition(".")
                row = rows.setdefault(key, {"key": key, "patient": None})
                data = content.read()
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
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shard}: not a whole shard of images with JSON: {error}") from error


def write_index(shard: Path, table: pa.Table) -> None:
    """Write a shard's index beside it."""
    with atomic_path(index_path(shard)) as temporary:
        pq.write_table(table, temporary)


def read_index(shard: Path) -> pa.Table:
    """Read the index beside a shard. Raises UserError where it is missing or is no index."""
    path = index_path(shard)
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; it should be beside {shard.name}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from error
    if table.schema.names != SCHEMA.names:
        raise UserError(f"{path}: its columns are {table.schema.names}; an index has {SCHEMA.names}")
    return table.cast(SCHEMA).combine_chunks()
