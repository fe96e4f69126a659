"""Index webdataset shards that others wrote, where they are: a folder, a pattern or a URL.

    vipbench index --train 'shards/train-{000000..000007}.tar' --test 'shards/test-*.tar' --classes nevus,melanoma --out data/mine

A sample is the members of a tar whose names agree up to the first dot of the base name, as webdataset has it: one image (jpg,
jpeg, png, webp) and one label (cls, txt or json). Shards are read once, from start to end; nothing but images' headers, JSON and
text is decoded. What is written is dataset.json and an index per shard.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from braceexpand import braceexpand

from harness.data.decode import Picture
from harness.data.images import BadImage
from harness.data.index import SCHEMA, HashedFile, read_members, write_index
from harness.data.remote import is_url, matching, open_binary
from harness.data.shards import INFO, DatasetInfo, ShardInfo, SplitInfo, content_digest
from harness.errors import UserError
from harness.files import write_json
from harness.progress import Progress

IMAGES, LABELS = ("jpg", "jpeg", "png", "webp"), ("cls", "txt", "json")
# 16-bit images need the window that `prepare` chooses.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Reading:
    """How shards are read.

    Attributes:
        classes: names in order; None takes the names that labels give, sorted.
        label_key, patient_key: where a JSON member holds them; dots go into nested objects.
        image: the extension of the image, where samples hold several.
    """

    classes: Sequence[str] | None = None
    label_key: str = "label"
    patient_key: str = "patient"
    image: str | None = None


@dataclass
class Found:
    """A sample of a shard: what its members say."""

    shard: str
    offset: int
    label: int | str | None = None
    name: str | None = None  # of the class, where the JSON gives one beside a number
    patient: str | None = None
    images: dict[str, dict[str, Any]] = field(default_factory=dict)  # by extension


def index_shards(
    patterns: Mapping[str, str], out: Path, reading: Reading, name: str | None = None, modality: str | None = None
) -> DatasetInfo:
    """Write dataset.json and an index per shard into `out`.

    Args:
        patterns: for each split its shards: paths or URLs with * or {000..011}; several with spaces between.

    Raises:
        UserError: no such shard, cut off, a sample without image or label, an unknown label, a key, image or patient twice.
    """
    shards = [(split, shard) for split, pattern in patterns.items() for shard in expand(pattern)]
    out.mkdir(parents=True, exist_ok=True)
    if (out / INFO).exists():
        raise UserError(f"{out / INFO}: exists; give another --out, or remove it to index again")
    found: dict[tuple[str, str], tuple[dict[str, Found], str]] = {}
    with Progress("index shards", len(shards), "shards") as progress:
        for split, shard in shards:
            found[split, shard] = read_shard(shard, reading)
            progress.advance(note=f"{sum(len(samples) for samples, _ in found.values())} samples")
    notes = _make_keys_distinct(found)
    classes = _classes(found, reading)
    pseudonyms = _pseudonyms(found)
    infos = {split: SplitInfo(counts=dict.fromkeys(classes, 0), shards=[]) for split in patterns}
    tables: dict[str, list[pa.Table]] = {split: [] for split in patterns}
    for number, ((split, shard), (samples, checksum)) in enumerate(found.items()):
        rows = [_row(key, sample, classes, pseudonyms) for key, sample in samples.items()]
        tables[split].append(pa.Table.from_pylist(rows, SCHEMA).combine_chunks())
        infos[split].shards.append(_shard_info(shard, split, number, checksum, len(samples), out))
        for label, count in Counter(row["label"] for row in rows).items():
            infos[split].counts[classes[label]] += count
    _refuse_leaks(tables)
    for label, count in infos["train"].counts.items() if "train" in infos else ():
        if not count:
            raise UserError(f"class {label!r} has no training image")
    for split, info in infos.items():
        for shard_info, table in zip(info.shards, tables[split], strict=True):
            write_index(out / shard_info.index_file, table)
    dataset = DatasetInfo(
        name=name or out.resolve().name,
        modality=modality,
        classes=classes,
        splits=infos,
        notes=notes,
        digest=content_digest(classes, tables),
    )
    write_json(out / INFO, dataset.model_dump())
    return dataset


def expand(patterns: str) -> list[str]:
    """Paths and URLs that patterns stand for, sorted within each. Raises UserError where one stands for nothing."""
    shards: list[str] = []
    for pattern in patterns.split():
        try:
            paths = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{pattern}: its braces do not match") from error
        for path in paths:
            if not any(sign in path for sign in "*?["):
                shards.append(path if is_url(path) else str(Path(path).resolve()))
            elif is_url(path):
                shards += matching(path)
            else:
                shards += sorted(str(Path(match).resolve()) for match in glob.glob(path))
    if not shards:
        raise UserError(f"{patterns}: no shard of this name; give paths or URLs with * or {{000..011}}")
    if len(set(shards)) < len(shards):
        raise UserError(f"{patterns}: names {Counter(shards).most_common(1)[0][0]} twice")
    return shards


def read_shard(shard: str, reading: Reading) -> tuple[dict[str, Found], str]:
    """The samples of a shard by key, in its order, and the shard's SHA-256 (hex)."""
    samples: dict[str, Found] = {}
    closed, last = set(), ""
    with open_binary(shard) as file:
        hashed = HashedFile(file)
        try:
            for member, data in read_members(hashed):
                key, extension = _key(member.name)
                if key != last and key in closed:
                    raise ValueError(f"sample {key!r} at byte {member.offset} is there twice")
                closed.add(last)
                last = key
                sample = samples.setdefault(key, Found(shard, member.offset))
                if extension in IMAGES if reading.image is None else extension == reading.image:
                    _check_image(data, member.name)
                    digest = hashlib.sha256(data).hexdigest()
                    sample.images[extension] = {"offset": member.offset_data, "size": member.size, "sha256": digest}
                elif extension in LABELS:
                    _read_label(sample, extension, data, member.name, reading)
            for key, sample in samples.items():
                _check(key, sample)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{shard}: {' '.join(str(error).split())}") from error
    if not samples:
        raise UserError(f"{shard}: holds no sample; webdataset's are an image and a label of one name")
    return samples, hashed.digest.hexdigest()


def _key(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the base name, and the rest is the extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _check_image(data: bytes, member: str) -> None:
    try:
        mode = Picture(data).mode
    except BadImage as error:
        raise ValueError(f"{member}: {error}") from error
    if mode not in MODES:
        raise ValueError(f"{member}: {mode} pixels have over 8 bits; `vipbench prepare` turns such images into 8 bits")


def _read_label(sample: Found, extension: str, data: bytes, member: str, reading: Reading) -> None:
    text = data.decode().strip()
    if extension != "json":
        sample.label = int(text) if text.lstrip("-").isdigit() else text
        return
    content = json.loads(text)
    if not isinstance(content, dict):
        sample.label = content if isinstance(content, int | str) else None
        return
    label = _dotted(content, reading.label_key)
    if label is not None:  # a JSON beside a .cls or .txt may hold other things only
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"{member}: {reading.label_key} is {label!r}; a label is a number or a class's name")
        sample.label, sample.name = label, content.get("class")
    patient = _dotted(content, reading.patient_key)
    sample.patient = None if patient is None else str(patient)


def _dotted(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _check(key: str, sample: Found) -> None:
    where = f"sample {key!r} at byte {sample.offset}"
    if len(sample.images) > 1:
        raise ValueError(f"{where} has several images ({', '.join(sorted(sample.images))}); say which with --image EXT")
    if not sample.images:
        raise ValueError(f"{where} has no image ({', '.join(IMAGES)})")
    if sample.label is None:
        raise ValueError(f"{where} has no label (.cls, .txt, or .json with the key that --label-key names)")


def _make_keys_distinct(found: dict[tuple[str, str], tuple[dict[str, Found], str]]) -> list[str]:
    """Put the shard's name before keys where shards use the same ones; returns a note about it."""
    keys = Counter(key for samples, _ in found.values() for key in samples)
    repeated = [key for key, count in keys.items() if count > 1]
    if not repeated:
        return []
    stems = {place: Path(place[1]).name.removesuffix(".tar") for place in found}
    if len(set(stems.values())) < len(stems):
        stems = {place: f"{place[0]}/{number:06d}" for number, place in enumerate(found)}
    for place, (samples, checksum) in list(found.items()):
        found[place] = ({f"{stems[place]}/{key}": sample for key, sample in samples.items()}, checksum)
    return [f"{len(repeated)} keys are in several shards, so ids hold the shard's name"]


def _classes(found: Mapping[tuple[str, str], tuple[dict[str, Found], str]], reading: Reading) -> list[str]:
    """Class names in order. Raises UserError where labels are numbers and nobody names them."""
    if reading.classes is not None:
        if len(set(reading.classes)) < len(reading.classes):
            raise UserError(f"--classes: {list(reading.classes)} are not distinct")
        return list(reading.classes)
    samples = [sample for part, _ in found.values() for sample in part.values()]
    if all(isinstance(sample.label, str) for sample in samples):
        return sorted({str(sample.label) for sample in samples})
    named = {sample.label: sample.name for sample in samples if sample.name}
    numbers = sorted({sample.label for sample in samples if isinstance(sample.label, int)})
    if numbers == list(range(len(numbers))) and set(named) == set(numbers):
        return [str(named[number]) for number in numbers]
    raise UserError(f"labels are numbers ({numbers[:5]} ...): name them in order with --classes A,B,C")


def _pseudonyms(found: Mapping[tuple[str, str], tuple[dict[str, Found], str]]) -> dict[str, str]:
    """Patients' ids in sorted order -> p0001, p0002, ..."""
    patients = sorted({one.patient for samples, _ in found.values() for one in samples.values() if one.patient})
    digits = max(4, len(str(len(patients))))
    return {patient: f"p{number:0{digits}d}" for number, patient in enumerate(patients, start=1)}


def _row(key: str, sample: Found, classes: Sequence[str], pseudonyms: Mapping[str, str]) -> dict[str, Any]:
    label = sample.label
    if isinstance(label, str) and label in classes:
        label = classes.index(label)
    if not isinstance(label, int) or not 0 <= label < len(classes):
        raise UserError(f"{sample.shard}: sample {key!r} has label {label!r}, which is none of {list(classes)}")
    ((extension, image),) = sample.images.items()
    patient = pseudonyms[sample.patient] if sample.patient else None
    return {"key": key, "label": label, "patient": patient, "extension": extension, **image}


def _shard_info(shard: str, split: str, number: int, checksum: str, samples: int, out: Path) -> ShardInfo:
    """A shard in `out` itself has its index beside it; one elsewhere has it in `out`."""
    inside = not is_url(shard) and Path(shard).parent == out.resolve() and shard.endswith(".tar")
    if inside:
        return ShardInfo(file=Path(shard).name, sha256=checksum, samples=samples)
    return ShardInfo(file=shard, sha256=checksum, samples=samples, index=f"{split}-{number:06d}.index.parquet")


def _refuse_leaks(tables: Mapping[str, Sequence[pa.Table]]) -> None:
    """Raises UserError where an image or a patient is in two splits."""
    for column, what in (("sha256", "the same image"), ("patient", "the same patient")):
        owners: dict[str, tuple[str, str]] = {}
        for split, parts in tables.items():
            for key, value in _pairs(parts, column):
                other, first = owners.setdefault(value, (split, key))
                if other != split:
                    raise UserError(f"{what} is in {other} (sample {first!r}) and in {split} (sample {key!r})")


def _pairs(parts: Sequence[pa.Table], column: str) -> Iterator[tuple[str, str]]:
    for part in parts:
        for key, value in zip(part["key"].to_pylist(), part[column].to_pylist(), strict=True):
            if value is not None:
                yield key, value
