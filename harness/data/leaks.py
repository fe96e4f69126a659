"""Images and patients that are there several times: found all at once, listed in one file, and treated by one rule.

A picture that is in two splits, or a patient, makes a test score too good. `--leaks` decides: `refuse` stops, `keep` leaves the
dataset as it was published, `drop-train` leaves test as it was published, and takes out of val what test holds, and out of train
what test or val holds. Copies within a split are listed and kept.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.info import LeakInfo
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import write_text

REPORT = "leaks.csv"
COLUMNS = ("finding", "kind", "split", "class", "sample", "dropped")
PRECEDENCE = ("test", "val", "train")  # a split keeps what no earlier one holds


class PlacedSample(NamedTuple):
    """A sample in its split; equal `image` means equal pixels or bytes."""

    key: str
    split: str
    label: int
    patient: str | None
    image: Hashable


class LeakDecision(NamedTuple):
    """Findings and their consequence: samples that stay [N] bool, the record, and the report's text (None: nothing found)."""

    kept: np.ndarray
    info: LeakInfo | None = None
    report: str | None = None

    @property
    def notes(self) -> list[str]:
        """The record as at most one line."""
        return [] if self.info is None else [_summary(self.info) + _outcome(self.info)]


def decide_leaks(samples: Sequence[PlacedSample], classes: Sequence[str], policy: Leaks, refused: Path) -> LeakDecision:
    """Find repeated images and patients, and decide which samples stay.

    Args:
        refused: where the report is written if they are refused.

    Raises:
        UserError: an image or a patient is in several splits, and the policy is to refuse.
    """
    images = [group for group in _groups(sample.image for sample in samples) if len(group) > 1]
    patients = [
        group for group in _groups(sample.patient for sample in samples) if len({samples[n].split for n in group}) > 1
    ]
    kept = _without_twins(samples) if policy is Leaks.drop_train else np.ones(len(samples), dtype=bool)
    refused.unlink(missing_ok=True)  # of an earlier call
    if not images and not patients:
        return LeakDecision(kept)
    info = LeakInfo(
        policy=policy.value,
        identical=len(images),
        across=sum(len({samples[n].split for n in group}) > 1 for group in images),
        contradictory=sum(len({samples[n].label for n in group}) > 1 for group in images),
        patients=len(patients),
        dropped=int((~kept).sum()),
    )
    report = _table(samples, classes, kept, images, patients)
    if policy is Leaks.refuse and (info.across or info.patients):
        write_text(refused, report)
        raise UserError(
            f"{_summary(info)}; {refused} lists them all; --leaks drop-train takes out of train what val or test holds "
            "(and out of val what test holds), --leaks keep leaves everything as published"
        )
    return LeakDecision(kept, info, report)


def _groups(values: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal values, in the order of their first; None is equal to nothing."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for position, value in enumerate(values):
        if value is not None:
            found[value].append(position)
    return list(found.values())


def _without_twins(samples: Sequence[PlacedSample]) -> np.ndarray:
    """[N] bool: samples whose image and patient no split before theirs holds."""
    kept = np.zeros(len(samples), dtype=bool)
    held: set[tuple[str, Hashable]] = set()
    for split in PRECEDENCE:
        members = [position for position, sample in enumerate(samples) if sample.split == split]
        marks = {
            position: {("image", samples[position].image)}
            | ({("patient", samples[position].patient)} if samples[position].patient is not None else set())
            for position in members
        }
        kept[[position for position in members if not marks[position] & held]] = True
        held |= {mark for position in members if kept[position] for mark in marks[position]}
    return kept


def _table(
    samples: Sequence[PlacedSample],
    classes: Sequence[str],
    kept: np.ndarray,
    images: Sequence[list[int]],
    patients: Sequence[list[int]],
) -> str:
    """A CSV line for each sample of each finding; patients are not named."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    findings = [("identical images", group) for group in images] + [("one patient", group) for group in patients]
    for number, (kind, group) in enumerate(findings, start=1):
        for position in group:
            sample = samples[position]
            dropped = "" if kept[position] else "yes"
            writer.writerow((number, kind, sample.split, classes[sample.label], sample.key, dropped))
    return text.getvalue()


def _summary(info: LeakInfo) -> str:
    return (
        f"{info.identical} groups of identical images ({info.across} across splits, {info.contradictory} under several "
        f"classes) and {info.patients} patients in several splits"
    )


def _outcome(info: LeakInfo) -> str:
    done = f"{info.dropped} samples dropped" if info.policy == Leaks.drop_train else "all are kept"
    return f": {done}; {REPORT} lists them"
