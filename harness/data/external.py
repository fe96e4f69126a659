"""Index webdataset shards that others wrote, where they are: a folder, a pattern or a URL.

    vipbench index --train 'shards/train-{000000..000007}.tar' --test 'shards/test-*.tar' --classes nevus,melanoma --out data/mine

A sample is one image (jpg, jpeg, png, webp) and one label (cls, json or txt, in this order) of one name; see
`harness/data/members.py`. Shards are read once, from start to end; nothing but images' headers, JSON and text is decoded. What
is written is dataset.json and an index per shard.
"""

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from braceexpand import braceexpand

from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.describe import check_training_images, count_labels, pseudonyms, write_description
from vipbench.harness.data.index import schema, write_index
from vipbench.harness.data.info import INFO, DatasetInfo, ShardInfo, check_dataset_name
from vipbench.harness.data.leaks import REPORT, LeakDecision, PlacedSample, decide_leaks
from vipbench.harness.data.members import Reading, ShardContent, ShardSample, read_shard
from vipbench.harness.data.names import check_class_names, is_plain_url, is_safe_name, sorted_classes
from vipbench.harness.data.remote import is_url, matching
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import output_errors, write_text
from vipbench.harness.system.progress import Progress
from vipbench.harness.system.urls import CREDENTIALS_ADVICE, has_credentials


class Place(NamedTuple):
    """A shard in a split."""

    split: str
    shard: str


Contents = Mapping[Place, ShardContent]


def index_shards(
    patterns: Mapping[str, Sequence[str]],
    out: Path,
    reading: Reading,
    name: str | None = None,
    modality: str | None = None,
    leaks: Leaks = Leaks.refuse,
    ordinal: bool = False,
) -> DatasetInfo:
    """Write dataset.json and an index per shard into `out`.

    Args:
        patterns: for each split its shards: paths or URLs, with * or {000..011}.
        leaks: what to do about images and patients in several splits; leaks.csv in `out` lists them.

    Raises:
        UserError: no such shard, cut off, a sample without image or label, an unknown label, a key twice, an image or patient in
            several splits, or `out` cannot be written.
    """
    name = out.resolve().name if name is None else name
    check_dataset_name(name, "the dataset's name")
    places = [Place(split, shard) for split, given in patterns.items() for shard in expand(given)]
    if (out / INFO).exists():
        raise UserError(f"{out / INFO}: exists; give another --out, or remove it to index again")
    with output_errors(out):  # before the shards are read, which takes long
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f".{INFO}.tried", "")
        (out / f".{INFO}.tried").unlink()
    contents: dict[Place, ShardContent] = {}
    with Progress("index shards", len(places), "shards") as progress:
        for place in places:
            contents[place] = read_shard(place.shard, reading)
            progress.advance(note=f"{sum(len(content.samples) for content in contents.values())} samples")
    prefixes = _prefixes(contents)
    classes = _classes(contents, reading)
    labels = {name: label for label, name in enumerate(classes)}
    patients = pseudonyms(sample.patient for content in contents.values() for sample in content.samples.values())
    tables = {
        place: pa.Table.from_pylist(
            [_row(prefixes[place] + key, sample, labels, patients) for key, sample in content.samples.items()],
            schema(reading.metadata),
        ).combine_chunks()
        for place, content in contents.items()
    }
    with output_errors(out):
        decision = decide_leaks(_placed(tables), classes, leaks, out / REPORT)
        by_split: dict[str, list[pa.Table]] = {}
        shards: dict[str, list[ShardInfo]] = {}
        for number, (place, table) in enumerate(_kept(tables, decision).items()):
            by_split.setdefault(place.split, []).append(table)
            info = _shard_info(place, number, contents[place].sha256, len(table), out)
            shards.setdefault(place.split, []).append(info)
        if "train" in by_split:
            check_training_images(count_labels(by_split["train"], classes))
        for split, parts in by_split.items():
            for info, table in zip(shards[split], parts, strict=True):
                write_index(out / info.index_file, table)
        return write_description(
            out,
            name=name,
            modality=modality,
            classes=classes,
            shards=shards,
            tables=by_split,
            notes=[*_notes(contents, prefixes), *decision.notes],
            leaks=decision,
            ordinal=ordinal,
        )


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs that patterns stand for, sorted within each. A file of exactly that name is itself.

    Raises:
        UserError: one stands for nothing, or two for the same shard.
    """
    shards: list[str] = []
    for pattern in patterns:
        shards += _expand(pattern)
    if len(set(shards)) < len(shards):
        raise UserError(f"{', '.join(patterns)}: names {Counter(shards).most_common(1)[0][0]} twice")
    return shards


def _expand(pattern: str) -> list[str]:
    if has_credentials(pattern):
        raise UserError(f"a URL with a user name or password would be written into dataset.json; {CREDENTIALS_ADVICE}")
    if not is_url(pattern) and Path(pattern).is_file():
        return [str(Path(pattern).resolve())]
    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: its braces do not match") from error
    shards: list[str] = []
    for path in paths:
        if not any(sign in path for sign in "*?["):
            shards.append(path if is_url(path) else str(Path(path).resolve()))
        elif is_url(path):
            shards += matching(path)
        else:
            shards += sorted(str(Path(match).resolve()) for match in glob.glob(path))
    if not shards:
        raise UserError(f"{pattern}: no shard of this name; give a path or URL, with * or {{000..011}} for several")
    if wrong := [shard for shard in shards if is_url(shard) and not is_plain_url(shard)]:
        raise UserError(f"{wrong[0]}: not a URL of one protocol, such as https://host/train-000.tar")
    return shards


def _prefixes(contents: Contents) -> dict[Place, str]:
    """The prefix of the keys of each shard: its name where shards use the same keys, else nothing."""
    if not _repeated(contents):
        return dict.fromkeys(contents, "")
    stems = {place: Path(place.shard).name.removesuffix(".tar") for place in contents}
    if len(set(stems.values())) < len(stems):
        stems = {place: f"{place.split}/{number:06d}" for number, place in enumerate(contents)}
    return {place: f"{stem}/" for place, stem in stems.items()}


def _repeated(contents: Contents) -> int:
    """Count the keys that are in several shards."""
    keys = Counter(key for content in contents.values() for key in content.samples)
    return sum(count > 1 for count in keys.values())


def _notes(contents: Contents, prefixes: Mapping[Place, str]) -> list[str]:
    notes = []
    if any(prefixes.values()):
        notes.append(f"{_repeated(contents)} keys are in several shards, so ids hold the shard's name")
    if passed_over := sum(content.passed_over for content in contents.values()):
        notes.append(f"{passed_over} files in the shards are no image or label of a sample and were passed over")
    return notes


def _classes(contents: Contents, reading: Reading) -> list[str]:
    """Class names in order. Raises UserError where labels are numbers and nobody names them, or names contradict each other."""
    keyed = [item for content in contents.values() for item in content.samples.items()]  # shards may share keys
    samples = [sample for _, sample in keyed]
    kinds = {sample.kind: key for key, sample in keyed}
    if len(kinds) > 1:
        (kind, key), (other, another), *_ = kinds.items()
        raise UserError(f"sample {key!r} has its label in .{kind}, sample {another!r} in .{other}; one kind is needed")
    if reading.classes is not None:
        return list(reading.classes)
    places = {sample.label: f"{sample.shard}: sample {key!r}" for key, sample in reversed(keyed)}
    labels = set(places)
    numbers = sorted({sample.number for sample in samples if sample.number is not None})
    if not numbers:
        classes = sorted_classes(places)
    else:
        named: dict[int, str] = {}
        for sample in samples:
            if sample.number is not None and sample.name:
                name = named.setdefault(sample.number, sample.name)
                if name != sample.name:
                    raise UserError(
                        f"{sample.shard}: label {sample.number} is class {sample.name!r} here and {name!r} elsewhere"
                    )
        if len(numbers) < len(labels) or numbers != list(range(len(numbers))) or set(named) != set(numbers):
            raise UserError(f"labels are numbers ({numbers[:5]} ...): name them in order with --classes A,B,C")
        classes = [named[number] for number in numbers]
    check_class_names(classes, "the shards' labels")
    return classes


def _row(key: str, sample: ShardSample, labels: Mapping[str, int], patients: Mapping[str, str]) -> dict[str, Any]:
    """A sample's row of the index. A label that is a class's name is that class; only another may be a position."""
    label = labels.get(sample.label, sample.number)
    if label is None or not 0 <= label < len(labels):
        shown = sample.number if sample.number is not None else sample.label[:80]
        raise UserError(f"{sample.shard}: sample {key!r} has label {shown!r}, which is none of {list(labels)}")
    ((extension, image),) = sample.images.items()
    patient = patients[sample.patient] if sample.patient else None
    return {"key": key, "label": label, "patient": patient, "extension": extension.rpartition(".")[2], **image} | dict(
        sample.metadata
    )


def _placed(tables: Mapping[Place, pa.Table]) -> list[PlacedSample]:
    """All samples; images are the same where their bytes are."""
    return [
        PlacedSample(row["key"], place.split, row["label"], row["patient"], row["sha256"])
        for place, table in tables.items()
        for row in table.to_pylist()
    ]


def _kept(tables: Mapping[Place, pa.Table], decision: LeakDecision) -> dict[Place, pa.Table]:
    """Tables without the samples that were dropped."""
    kept, first = {}, 0
    for place, table in tables.items():
        kept[place] = table.filter(pa.array(decision.kept[first : first + len(table)])).combine_chunks()
        first += len(table)
    return {place: table for place, table in kept.items() if len(table)}


def _shard_info(place: Place, number: int, checksum: str, samples: int, out: Path) -> ShardInfo:
    """A shard in `out` itself has its index beside it; one elsewhere has it in `out`."""
    path = Path(place.shard)
    inside = (
        not is_url(place.shard) and path.parent == out.resolve() and path.suffix == ".tar" and is_safe_name(path.name)
    )
    if inside:
        return ShardInfo(file=path.name, sha256=checksum, samples=samples)
    index = f"{place.split}-{number:06d}.index.parquet"
    return ShardInfo(file=place.shard, sha256=checksum, samples=samples, index=index)
