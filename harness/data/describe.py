"""Write dataset.json and leaks.csv of a dataset, from the index tables of its shards."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from vipbench.harness.data.digest import content_digest
from vipbench.harness.data.info import INFO, DatasetInfo, ShardInfo, SplitInfo
from vipbench.harness.data.leaks import REPORT, LeakDecision
from vipbench.harness.data.reader import Samples
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import write_json, write_text


def write_description(
    folder: Path,
    *,
    name: str,
    modality: str | None,
    classes: Sequence[str],
    shards: Mapping[str, Sequence[ShardInfo]],
    tables: Mapping[str, Sequence[pa.Table]],
    notes: Sequence[str],
    leaks: LeakDecision,
    ordinal: bool = False,
) -> DatasetInfo:
    """Write dataset.json into a folder, last of all its files, and leaks.csv where images or patients are repeated.

    Args:
        shards, tables: for each split its shards, and their index tables in the same order.
    """
    info = DatasetInfo(
        name=name,
        modality=modality,
        classes=list(classes),
        splits={
            split: SplitInfo(counts=count_labels(parts, classes), shards=list(shards[split]))
            for split, parts in tables.items()
        },
        notes=list(notes),
        leaks=leaks.info,
        ordinal=ordinal,
        digest=digest_tables(classes, tables),
    )
    if leaks.report is not None:
        write_text(folder / REPORT, leaks.report)
    write_json(folder / INFO, info.model_dump(exclude=None if ordinal else {"ordinal"}))
    return info


def count_labels(tables: Sequence[pa.Table], classes: Sequence[str]) -> dict[str, int]:
    """Count the samples of each class in index tables."""
    found = Counter(label for table in tables for label in table["label"].to_pylist())
    return {name: found[label] for label, name in enumerate(classes)}


def digest_tables(classes: Sequence[str], tables: Mapping[str, Sequence[pa.Table]]) -> str:
    """Compute the content digest of a dataset from the index tables of its splits."""
    return content_digest(classes, {split: Samples.from_indexes((), parts) for split, parts in tables.items()})


def check_training_images(counts: Mapping[str, float]) -> None:
    """Raise UserError where a class has no training image.

    Args:
        counts: training images by class.
    """
    if empty := [name for name, count in counts.items() if not count]:
        raise UserError(f"class {empty[0]!r} has no training image; add some, or leave the class out")


def pseudonyms(patients: Iterable[str | None]) -> dict[str, str]:
    """Replace patients' ids by p0001, p0002, ... in sorted order; None, where the patient is unknown, is left out."""
    known = sorted({patient for patient in patients if patient})
    digits = max(4, len(str(len(known))))
    return {patient: f"p{number:0{digits}d}" for number, patient in enumerate(known, start=1)}
