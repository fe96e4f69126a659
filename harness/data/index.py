"""The index beside a shard: one row per sample with the place of its image, so that any sample can be read alone."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vipbench.harness.data.names import SHA256, check_columns
from vipbench.harness.data.remote import Stream, read_bytes
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import atomic_path, parse_json

PREPARED_EXTENSIONS = ("jpg", "png")  # of the images that `prepare` writes
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_SHARD_BYTES = 1 << 42
MAX_MEMBER_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20  # of a long name or an extended header, which tarfile reads whole
HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_PADDING_BYTES = 1 << 26  # after a tar's end
MAX_READS_AT_END = 16
MAX_ROWS = 20_000_000  # of a shard's index
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


def schema(metadata: Sequence[str] = ()) -> pa.Schema:
    """`SCHEMA` and a text column for each of these names: sex, site or the like, by which results are split."""
    return pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in metadata)])


def index_path(shard: str | Path) -> Path:
    """The path of a shard's index: train-000000.tar -> train-000000.index.parquet."""
    return Path(shard).with_suffix(".index.parquet")


class HashedFile:
    """A file that is read once from its start.

    Attributes:
        position: bytes read. last: the last 512 of them. digest: their SHA-256 so far.
    """

    def __init__(self, file: Stream) -> None:
        self.file, self.position, self.last, self.digest = file, 0, b"", hashlib.sha256()
        self.reads_at_end = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        self.digest.update(data)
        self.reads_at_end += not data
        # tarfile reads on through a member whose size is a lie, block after block.
        if self.reads_at_end > MAX_READS_AT_END:
            raise tarfile.ReadError("a member goes on after its end")
        if self.position > MAX_SHARD_BYTES:
            raise tarfile.ReadError(f"it has over {MAX_SHARD_BYTES} bytes")
        return data


class _BoundedTarInfo(tarfile.TarInfo):
    """A tar's header that is an error where it is damaged, which tarfile takes for the end, and whose own data (long names,
    extended headers) may not fill the memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a damaged header: {error}") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a member is sparse")
        if self.size < 0 or (self.type in HEADER_TYPES and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_members(
    file: HashedFile, wanted: Callable[[tarfile.TarInfo], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files in a tar and their content, in one pass over all of it; content is read where it is wanted, else empty.

    Raises:
        ValueError: not an uncompressed tar, cut off (with the byte), a wanted member that is sparse or too large.
    """
    source: Any = file
    try:
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_BoundedTarInfo) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header, which fills the memory
                if not member.isfile():
                    continue
                if not wanted(member):
                    yield member, b""
                    continue
                if member.issparse() or not 0 <= member.size <= MAX_MEMBER_BYTES:
                    what = "is sparse" if member.issparse() else f"has {member.size} bytes"
                    raise ValueError(
                        f"{member.name[:200]!r} {what}; a member is whole, of at most {MAX_MEMBER_BYTES} bytes"
                    )
                content = tar.extractfile(member)
                assert content is not None
                yield member, content.read()
    except (tarfile.TarError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a whole tar: {error} (at byte {file.position})") from error
    end = file.position
    while file.read(1 << 20):
        if file.position - end > MAX_PADDING_BYTES:
            raise ValueError(f"it goes on for over {MAX_PADDING_BYTES} bytes after the tar's end at byte {end}")
    if file.last != bytes(tarfile.BLOCKSIZE):  # zeros end a tar
        raise ValueError(f"it ends at byte {file.position} without the mark of a tar's end: it was cut off")


def index_shard(shard: Path) -> pa.Table:
    """Read a shard's headers, labels and images, and describe each sample: a table of `SCHEMA`, in the shard's order.

    Raises:
        UserError: not a tar of pairs of an image and a JSON member, or cut off.
    """
    rows = PreparedRows(shard)
    try:
        with shard.open("rb") as file:
            for member, data in read_members(HashedFile(file), lambda member: True):
                rows.add(member, data)
        return rows.table()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shard}: not a whole shard of images with JSON: {error}") from error


class PreparedRows:
    """Rows of the index of a shard that `prepare` wrote, from its members one after the other."""

    def __init__(self, shard: str | Path) -> None:
        self._shard = shard
        self._rows: dict[str, dict[str, Any]] = {}
        self._metadata: list[str] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, member: tarfile.TarInfo, data: bytes) -> None:
        """Take in a member. Raises ValueError, KeyError or TypeError where it is not as `prepare` writes it."""
        key, _, extension = member.name.rpartition(".")
        row = self._rows.setdefault(key, {"key": key, "patient": None})
        if extension == "json":
            meta = parse_json(data)
            if not isinstance(meta, dict):
                raise TypeError(f"{member.name} holds no JSON object")
            metadata = dict(meta.get("metadata", {}))
            if self._metadata is None:
                self._metadata = list(metadata)
                check_columns(self._metadata, f"{self._shard}: metadata of sample {key!r}")
            if list(metadata) != self._metadata:
                raise ValueError(f"sample {key!r} has other metadata than the samples before")
            row |= {"label": meta["label"], "patient": meta.get("patient"), **metadata}
        elif extension in PREPARED_EXTENSIONS:
            digest = hashlib.sha256(data).hexdigest()
            row |= {"extension": extension, "offset": member.offset_data, "size": member.size, "sha256": digest}

    def table(self) -> pa.Table:
        """All rows. Raises ValueError where a sample lacks its image or label."""
        for row in self._rows.values():
            if not row.keys() >= set(SCHEMA.names):
                raise ValueError(f"sample {row['key']!r} has no {'image' if 'label' in row else 'label'}")
        return pa.Table.from_pylist(list(self._rows.values()), schema(self._metadata or ())).combine_chunks()


def write_index(path: Path, table: pa.Table) -> None:
    """Write a shard's index."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_index(path: str | Path) -> pa.Table:
    """Read an index, from a file or a URL. Raises UserError where it is missing or is no index."""
    content = read_bytes(path)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        names = file.schema_arrow.names
        are_text = all(file.schema_arrow.field(place).type == pa.string() for place in range(len(SCHEMA), len(names)))
        if names[: len(SCHEMA)] != SCHEMA.names or not are_text:
            raise UserError(
                f"{path}: its columns are {names[:20]}; an index has {SCHEMA.names}, and then text as metadata"
            )
        metadata = names[len(SCHEMA) :]
        check_columns(metadata, str(path))
        if file.metadata.num_rows > MAX_ROWS:
            raise UserError(f"{path}: has {file.metadata.num_rows} rows; the index of a shard has at most {MAX_ROWS}")
        table = file.read().cast(schema(metadata)).combine_chunks()
        table.validate(full=True)  # text that is no Unicode
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file with an index: {' '.join(str(error).split())[:300]}") from error
    return table


def check_index(table: pa.Table, path: str | Path, samples: int, classes: int) -> pa.Table:
    """Check everything that the reader relies on, and return the table.

    Args:
        samples: how many dataset.json lists for the shard. classes: how many classes there are.

    Raises:
        UserError: the index holds what cannot be: no or another number of samples, gaps, labels of no class, impossible places.
    """
    if len(table) != samples:
        raise UserError(f"{path}: the index lists {len(table)} samples, not {samples}")
    for name in SCHEMA.names:
        if name != "patient" and table[name].null_count:
            raise UserError(f"{path}: the column {name!r} has gaps")
    allowed = {  # least and greatest
        "label": (0, classes - 1),
        "offset": (tarfile.BLOCKSIZE, MAX_SHARD_BYTES),
        "size": (1, MAX_MEMBER_BYTES),
    }
    for name, (least, greatest) in allowed.items():
        found = pc.min_max(table[name]).as_py()
        if found["min"] < least or found["max"] > greatest:
            wrong = found["min"] if found["min"] < least else found["max"]
            raise UserError(f"{path}: the column {name!r} holds {wrong}; it should be {least} to {greatest}")
    patterns = {"key": r"^.", "sha256": SHA256, "extension": f"^({'|'.join(IMAGE_EXTENSIONS)})$"}
    for name, pattern in patterns.items():
        fits = pc.match_substring_regex(table[name], pattern)
        if not pc.all(fits).as_py():
            wrong = table[name].filter(pc.invert(fits))[0].as_py()
            raise UserError(f"{path}: the column {name!r} holds {wrong[:80]!r}, which is none")
    return table
