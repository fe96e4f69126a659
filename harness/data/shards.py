"""A prepared dataset: webdataset tar shards, an index beside each, and dataset.json; written whole or not at all.

The same images, labels and splits give the same bytes, for any number of processes; the digest does not depend on
the size of the shards. Within a shard samples are in a random order, so that a shard is a fair part of its split.
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from vipbench.harness.data.check import Checked, check_images
from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.describe import pseudonyms, write_description
from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.data.index import (
    HashedFile,
    PreparedRows,
    check_index,
    index_path,
    index_shard,
    read_index,
    read_members,
    write_index,
)
from vipbench.harness.data.info import INFO, DatasetInfo, ShardInfo, check_dataset_name
from vipbench.harness.data.leaks import REPORT
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.remote import join, open_binary
from vipbench.harness.data.splits import HoldOut, split_samples
from vipbench.harness.data.stateless_random import keyed_digest
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import atomic_directory, digest_file
from vipbench.harness.system.progress import Progress

SHARD_BYTES = 256 * 2**20
WRITER = "vipbench"  # the owner of members in the shards that are written here


def write_dataset(
    source: Source,
    out: Path,
    *,
    name: str,
    modality: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_error: Literal["raise", "skip"] = "raise",
    leaks: Leaks = Leaks.refuse,
    overwrite: bool = False,
    hold_out: HoldOut | None = None,
    workers: int = 1,
    ordinal: bool = False,
) -> DatasetInfo:
    """Check every image of a source and write them as a dataset; `out` appears when it is whole.

    Args:
        shard_bytes: about how many bytes of images go into a shard.
        on_error: "skip" leaves out images that cannot be used, and names them in the notes.
        leaks: what to do about images and patients in several splits of the source; leaks.csv lists them.
        hold_out: how to make val and test where the source lacks them; default `HoldOut()`.
        workers: processes that decode.
        ordinal: the order of the classes is one of degree, even if the source does not declare it.

    Raises:
        UserError: `out` exists (or, with `overwrite`, is no dataset) or cannot be written, an image cannot be used, an image or
            patient is in two splits and `leaks` is to refuse, a class has no training image.
    """
    check_dataset_name(name, "the dataset's name")
    if overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        DatasetInfo.load(out)  # --overwrite replaces datasets, nothing else
    with atomic_directory(out, overwrite) as folder, tempfile.TemporaryFile(dir=folder) as spool:
        samples, image_notes = check_images(source, spool, on_error == "skip", workers)
        place = Path(os.path.abspath(out))
        refused = place.parent / f"{place.name}.{REPORT}"
        split = split_samples(samples, source.classes, hold_out or HoldOut(), leaks, refused)
        records = [sample.record for members in split.splits.values() for sample in members]
        known = [record.patient for record in records if record.patient]
        patients = dict(zip(known, known, strict=True)) if source.pseudonymous else pseudonyms(known)
        shards: dict[str, list[ShardInfo]] = {name_of_split: [] for name_of_split in split.splits}
        tables: dict[str, list[pa.Table]] = {name_of_split: [] for name_of_split in split.splits}
        with Progress("write shards", sum(map(len, split.splits.values())), "images") as progress:
            for name_of_split, members in split.splits.items():
                for number, part in enumerate(_parts(members, shard_bytes)):
                    shard = folder / f"{name_of_split}-{number:06d}.tar"
                    _write_shard(shard, part, source.classes, patients, spool)
                    table = index_shard(shard)
                    write_index(index_path(shard), table)
                    shards[name_of_split].append(
                        ShardInfo(file=shard.name, sha256=digest_file(shard), samples=len(part))
                    )
                    tables[name_of_split].append(table)
                    progress.advance(len(part))
        return write_description(
            folder,
            name=name,
            modality=modality,
            classes=source.classes,
            shards=shards,
            tables=tables,
            notes=[*source.notes, *split.notes, *_patients_in_names(records), *image_notes],
            leaks=split.leaks,
            ordinal=ordinal or source.ordinal,
        )


def verify(folder: str | Path) -> None:
    """Check every shard, image, index and count of a dataset against its checksums, and the indexes against the shards.

    Raises:
        UserError: something differs or is missing; the message names the shard and, where it can be told, the sample.
    """
    info = DatasetInfo.load(folder)
    with Progress("verify", sum(len(split.shards) for split in info.splits.values()), "shards") as progress:
        for split in info.splits.values():
            for shard in split.shards:
                _verify_shard(folder, shard, len(info.classes))
                progress.advance()
    Dataset(folder)  # counts, keys and the digest


def _verify_shard(folder: str | Path, info: ShardInfo, classes: int) -> None:
    """Compare a shard with its checksum, and each row of its index with the shard's content."""
    path, index = join(folder, info.file), join(folder, info.index_file)
    table = check_index(read_index(index), index, info.samples, classes)
    rows = {row["offset"]: row for row in table.to_pylist()}
    digests: dict[int, str] = {}
    differing: list[str] = []
    ours, problem = PreparedRows(path), ""
    with open_binary(path) as opened:
        file = HashedFile(opened)
        try:
            for member, data in read_members(file, lambda member: member.uname == WRITER or member.offset_data in rows):
                if member.uname == WRITER:
                    ours.add(member, data)
                if row := rows.get(member.offset_data):
                    digests[member.offset_data] = hashlib.sha256(data).hexdigest()
                    differing += _differences(row, member)
            held = ours.table()
        except (ValueError, KeyError, TypeError) as error:
            problem = " ".join(str(error).split())[:400]
    damaged = [row for offset, row in rows.items() if digests.get(offset) != row["sha256"]]
    if problem or file.digest.hexdigest() != info.sha256:
        if damaged:
            raise UserError(
                f"{path}: sample {damaged[0]['key']!r} at byte {damaged[0]['offset']} is damaged (checksum)"
            )
        raise UserError(
            f"{path}: {problem or f'its checksum differs from that in {INFO}, though each image in it is whole'}"
        )
    if damaged:
        raise UserError(f"{path}: the index beside it describes other content; prepare or index the data again")
    if not differing and len(ours) and not held.equals(table):
        differing = [_first_difference(held, table)]
    if differing:
        raise UserError(f"{index}: not what its shard holds: {differing[0]}; prepare or index the data again")


def _differences(row: dict[str, Any], member: tarfile.TarInfo) -> list[str]:
    """A phrase for each thing in which a row of an index differs from its member, but for the content."""
    key, extension, name = row["key"], row["extension"], member.name
    stems = [name[:place] for place, sign in enumerate(name) if sign == "."]
    found = []
    if row["size"] != member.size:
        found.append(f"sample {key!r} has size {row['size']}, but the shard has {member.size}")
    if not name.lower().endswith(f".{extension}"):
        found.append(f"sample {key!r} has extension {extension!r}, but its file is {name!r}")
    if not any(key == stem or key.endswith(f"/{stem}") for stem in stems):
        found.append(f"sample {key!r} is no sample there; its place is that of {name!r}")
    return found


def _first_difference(held: pa.Table, indexed: pa.Table) -> str:
    """A phrase for the first row in which a shard and its index differ."""
    if len(held) != len(indexed):
        return f"the shard has {len(held)} samples, the index {len(indexed)}"
    rows = zip(held.to_pylist(), indexed.to_pylist(), strict=True)
    row, other = next((row, other) for row, other in rows if row != other)
    column = next(name for name in row if row[name] != other[name])
    return f"sample {other['key']!r} has {column} {other[column]!r}, but the shard has {row[column]!r}"


def _patients_in_names(records: Sequence[Record]) -> list[str]:
    """A note where file names give patients' ids away."""
    shown = sum(record.patient in record.key for record in records if record.patient)
    return [f"{shown} file names hold their patient's id, and so do the sample ids made of them"] if shown else []


def _parts(samples: list[Checked], shard_bytes: int) -> Iterator[list[Checked]]:
    """Samples in a random order that depends on their keys only, cut once a part holds `shard_bytes`."""
    part, size = [], 0
    for sample in sorted(samples, key=lambda sample: keyed_digest("shard order", sample.record.key)):
        part.append(sample)
        size += sample.size
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_shard(
    path: Path, samples: list[Checked], classes: list[str], patients: dict[str, str], spool: BinaryIO
) -> None:
    from webdataset.writer import TarWriter  # slow to import, and not needed to read

    # Everything that a tar holds about a file is fixed, so that the same samples give the same bytes.
    with path.open("wb") as file:
        with TarWriter(file, user="vipbench", group="vipbench", mode=0o444, mtime=0) as tar:
            for sample in samples:
                record = sample.record
                meta: dict[str, Any] = {"label": record.label, "class": classes[record.label]}
                if record.patient:
                    meta["patient"] = patients[record.patient]
                if record.metadata:
                    meta["metadata"] = dict(record.metadata)
                spool.seek(sample.offset)
                tar.write({"__key__": record.key, sample.extension: spool.read(sample.size), "json": meta})
        file.flush()
        os.fsync(file.fileno())
