"""A prepared dataset: webdataset tar shards, an index beside each, and dataset.json; written whole or not at all.

The same images, labels and splits give the same bytes, for any number of processes; the digest does not depend on
the size of the shards. Within a shard samples are in a random order, so that a shard is a fair part of its split.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from harness.data.check import Checked, check_images
from harness.data.index import HashedFile, index_path, index_shard, read_index, read_members, write_index
from harness.data.keyed import keyed_rank
from harness.data.remote import is_url, join, open_binary, read_bytes
from harness.data.sources import Source
from harness.data.splits import HoldOut, split_samples
from harness.errors import UserError
from harness.files import atomic_directory, digest_file, write_json
from harness.progress import Progress

INFO = "dataset.json"
SHARD_BYTES = 256 * 2**20


class ShardInfo(BaseModel):
    """One shard: its file, its checksum, and how many samples it holds.

    Attributes:
        file: a name in the dataset's folder, or, for a shard that others wrote, an absolute path or a URL.
        index: the index's file in the dataset's folder; None: beside the shard, by its name.
    """

    file: str
    sha256: str
    samples: int
    index: str | None = None

    @property
    def index_file(self) -> str:
        """Where the index is."""
        return self.index or self.file.removesuffix(".tar") + ".index.parquet"


class SplitInfo(BaseModel):
    """How many samples of each class a split has, and its shards."""

    counts: dict[str, int]
    shards: list[ShardInfo]


class DatasetInfo(BaseModel):
    """What dataset.json says.

    Attributes:
        classes: names in the order of their labels.
        notes: what was decided when it was prepared: splits that were made, images that were skipped or changed.
        digest: SHA-256 (hex) of classes and samples; see `content_digest`.
    """

    format: Literal["vipbench-dataset/1"] = "vipbench-dataset/1"
    name: str
    modality: str | None
    classes: list[str]
    splits: dict[str, SplitInfo]
    notes: list[str]
    digest: str

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a dataset's description from its folder or URL. Raises UserError where it is none."""
        path = join(folder, INFO)
        if not is_url(path) and not Path(path).is_file():
            raise UserError(f"{folder}: not a prepared dataset (it has no {INFO}); make one with `vipbench prepare`")
        try:
            return cls.model_validate_json(read_bytes(path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: not a prepared dataset of this version: {place}: {first['msg']}") from error


def write_dataset(
    source: Source,
    out: Path,
    *,
    name: str,
    modality: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    hold_out: HoldOut | None = None,
    workers: int = 1,
) -> DatasetInfo:
    """Check every image of a source and write them as a dataset; `out` appears when it is whole.

    Args:
        shard_bytes: about how many bytes of images go into a shard.
        on_error: "skip" leaves out images that cannot be used and says so in the notes.
        hold_out: how to make val and test where the source lacks them; default `HoldOut()`.
        workers: processes that decode.

    Raises:
        UserError: `out` exists (or, with `overwrite`, is no dataset), an image cannot be used, an image or patient is in
            two splits, a class has no training image.
    """
    if overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        DatasetInfo.load(out)  # --overwrite replaces datasets, nothing else
    with atomic_directory(out, overwrite) as folder, tempfile.TemporaryFile(dir=folder) as spool:
        samples, image_notes = check_images(source.records, spool, on_error == "skip", workers)
        splits, split_notes = split_samples(samples, source.classes, hold_out or HoldOut())
        patients, patient_notes = _pseudonyms(samples)
        infos: dict[str, SplitInfo] = {}
        tables: dict[str, list[pa.Table]] = {}
        with Progress("write shards", len(samples), "images") as progress:
            for split, members in splits.items():
                labels = Counter(sample.record.label for sample in members)
                counts = {name: labels[label] for label, name in enumerate(source.classes)}
                infos[split], tables[split] = SplitInfo(counts=counts, shards=[]), []
                for number, part in enumerate(_parts(members, shard_bytes)):
                    shard = folder / f"{split}-{number:06d}.tar"
                    _write_shard(shard, part, source.classes, patients, spool)
                    table = index_shard(shard)
                    write_index(index_path(shard), table)
                    checksum = digest_file(shard)
                    infos[split].shards.append(ShardInfo(file=shard.name, sha256=checksum, samples=len(part)))
                    tables[split].append(table)
                    progress.advance(len(part))
        info = DatasetInfo(
            name=name,
            modality=modality,
            classes=source.classes,
            splits=infos,
            notes=[*source.notes, *split_notes, *patient_notes, *image_notes],
            digest=content_digest(source.classes, tables),
        )
        write_json(folder / INFO, info.model_dump())
    return info


def content_digest(classes: list[str], tables: dict[str, list[pa.Table]]) -> str:
    """SHA-256 (hex) of classes and sorted (split, key, label, SHA-256 of the stored image), one JSON line each."""
    digest = hashlib.sha256(json.dumps(classes).encode() + b"\n")
    for split in sorted(tables):
        table = pa.concat_tables(tables[split]).select(["key", "label", "sha256"]).sort_by("key")
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            digest.update(json.dumps([split, *row]).encode() + b"\n")
    return digest.hexdigest()


def verify(folder: str | Path) -> None:
    """Check every shard, image, index and count of a dataset against its checksums.

    Raises:
        UserError: something differs or is missing; the message names the shard and, where it can be told, the sample.
    """
    info, path = DatasetInfo.load(folder), join(folder, INFO)
    tables: dict[str, list[pa.Table]] = {}
    with Progress("verify", sum(len(split.shards) for split in info.splits.values()), "shards") as progress:
        for split, split_info in info.splits.items():
            tables[split] = [_verified(folder, shard) for shard in split_info.shards]
            progress.advance(len(split_info.shards))
            found = Counter(pa.concat_tables(tables[split])["label"].to_pylist())
            if found != Counter({label: split_info.counts.get(name, 0) for label, name in enumerate(info.classes)}):
                raise UserError(f"{path}: counts of {split} are not those of its shards")
    if content_digest(info.classes, tables) != info.digest:
        raise UserError(f"{path}: the digest is not that of its shards; classes or labels were changed")


def _verified(folder: str | Path, info: ShardInfo) -> pa.Table:
    """A shard's index, once the shard and the index are known to be whole."""
    path = join(folder, info.file)
    table = read_index(join(folder, info.index_file))
    found: dict[int, str] = {}
    with open_binary(path) as opened:
        file = HashedFile(opened)
        try:
            for member, data in read_members(file):
                found[member.offset_data] = hashlib.sha256(data).hexdigest()
            problem = ""
        except ValueError as error:
            problem = str(error)
    images = [(row["key"], row["offset"], row["sha256"]) for row in table.to_pylist()]
    damaged = [(key, offset) for key, offset, digest in images if found.get(offset) != digest]
    if problem or file.digest.hexdigest() != info.sha256:
        if damaged:
            raise UserError(f"{path}: sample {damaged[0][0]!r} at byte {damaged[0][1]} is damaged (checksum)")
        raise UserError(
            f"{path}: {problem or f'its checksum differs from that in {INFO}, though each image in it is whole'}"
        )
    if damaged:
        raise UserError(f"{path}: the index beside it describes other content; prepare or index the data again")
    return table


def _pseudonyms(samples: list[Checked]) -> tuple[dict[str, str], list[str]]:
    """Patients' ids in sorted order -> p0001, p0002, ...; and a note where file names give them away."""
    known = {sample.record.patient: sample.record.key for sample in samples if sample.record.patient}
    digits = max(4, len(str(len(known))))
    names = {patient: f"p{number:0{digits}d}" for number, patient in enumerate(sorted(known), start=1)}
    shown = sum(sample.record.patient in sample.record.key for sample in samples if sample.record.patient)
    notes = [f"{shown} file names hold their patient's id, and so do the sample ids made of them"] if shown else []
    return names, notes


def _parts(samples: list[Checked], shard_bytes: int) -> Iterator[list[Checked]]:
    """Samples in a random order that depends on their keys only, cut once a part holds `shard_bytes`."""
    part, size = [], 0
    for sample in sorted(samples, key=lambda sample: keyed_rank("shard order", sample.record.key)):
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

    # Everything that a tar says of a file is fixed, so that the same samples give the same bytes.
    with path.open("wb") as file:
        with TarWriter(file, user="vipbench", group="vipbench", mode=0o444, mtime=0) as tar:
            for sample in samples:
                record = sample.record
                meta: dict[str, int | str] = {"label": record.label, "class": classes[record.label]}
                if record.patient:
                    meta["patient"] = patients[record.patient]
                spool.seek(sample.offset)
                tar.write({"__key__": record.key, sample.extension: spool.read(sample.size), "json": meta})
        file.flush()
        os.fsync(file.fileno())
