"""Put images into splits: the source's own, with a missing val or test split held out from train, no patient in two of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vipbench.harness.data.check import Checked
from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.describe import check_training_images
from vipbench.harness.data.info import SPLITS
from vipbench.harness.data.leaks import LeakDecision, PlacedSample, decide_leaks
from vipbench.harness.data.stateless_random import keyed_digest
from vipbench.harness.errors import UserError


@dataclass(frozen=True)
class HoldOut:
    """The part of each class's training images that becomes a split which the source lacks; 0 leaves it missing."""

    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        fractions = (self.val_fraction, self.test_fraction)
        if not all(fraction >= 0 for fraction in fractions) or not sum(fractions) < 1:  # NaN is neither
            raise UserError(
                f"fractions: val {self.val_fraction} and test {self.test_fraction} must be at least 0 and sum to less than 1"
            )


class SplitSamples(NamedTuple):
    """Samples by split, in the order train, val, test, without empty splits; notes on decisions; repeated images."""

    splits: dict[str, list[Checked]]
    notes: list[str]
    leaks: LeakDecision


def split_samples(
    samples: list[Checked], classes: list[str], hold_out: HoldOut, leaks: Leaks, refused: Path
) -> SplitSamples:
    """Put samples into splits. A source without any split is all train to begin with; one with a test split only stays so.

    Args:
        leaks: what to do about images and patients in several splits. refused: where they are listed if they are refused.

    Raises:
        UserError: an image or a patient is in several splits, which `leaks` refuses; or a class has no training image.
    """
    placed = [
        PlacedSample(one.record.key, one.record.split or "train", one.record.label, one.record.patient, one.pixels)
        for one in samples
    ]
    decision = decide_leaks(placed, classes, leaks, refused)
    splits: dict[str, list[Checked]] = {split: [] for split in SPLITS}
    for sample, keep in zip(samples, decision.kept, strict=True):
        if keep:
            splits[sample.record.split or "train"].append(sample)
    notes = decision.notes
    if pool := splits["train"]:
        check_training_images(dict(zip(classes, _per_class(pool, len(classes)), strict=True)))
        fractions = {"test": hold_out.test_fraction, "val": hold_out.val_fraction}
        for split, fraction in fractions.items():
            if not splits[split] and fraction:
                rest = splits["train"]
                held = _hold_out(rest, _per_class(pool, len(classes)) * fraction, split, hold_out.seed)
                splits[split] = [sample for sample, out in zip(rest, held, strict=True) if out]
                splits["train"] = [sample for sample, out in zip(rest, held, strict=True) if not out]
                notes += _describe(split, splits[split], pool, classes, fraction, hold_out.seed)
    else:
        notes.append("there is no train split: this dataset is for evaluation only")
    return SplitSamples({split: members for split, members in splits.items() if members}, notes, decision)


def _hold_out(samples: list[Checked], target: np.ndarray, split: str, seed: int) -> np.ndarray:
    """[N] bool: samples to hold out, about `target` [C] per class, in whole groups that share a patient or an image.

    Groups are offered in a random order; one is taken where that brings the counts nearer to the target, and where each
    class keeps a sample. (scikit-learn's StratifiedGroupKFold offers fractions of 1/k only, and may leave a class with none.)
    """
    target = np.maximum(target, 1)  # a rare class is tested too
    groups = _groups(samples)
    left, taken = _per_class(samples, len(target)), np.zeros_like(target)
    held = np.zeros(len(samples), dtype=bool)
    for members in sorted(groups, key=lambda group: keyed_digest(split, seed, samples[group[0]].record.key)):
        counts = _per_class((samples[position] for position in members), len(target))
        nearer = (np.abs(taken + counts - target) / target).sum() < (np.abs(taken - target) / target).sum()
        if nearer and (left - counts >= 1)[counts > 0].all():
            held[members] = True
            taken, left = taken + counts, left - counts
    return held


def _groups(samples: list[Checked]) -> list[list[int]]:
    """Positions of samples that belong together: linked by a patient or by the same pixels, directly or over others."""
    links: dict[tuple[str, str], int] = {}  # each has a number, and is a node of the graph beside the samples
    edges = []
    for position, sample in enumerate(samples):
        patient = [("patient", sample.record.patient)] if sample.record.patient else []
        for link in [("image", sample.pixels), *patient]:
            edges.append((position, len(samples) + links.setdefault(link, len(links))))
    nodes, (rows, columns) = len(samples) + len(links), np.array(edges).T
    graph = coo_array((np.ones(len(edges), dtype=bool), (rows, columns)), (nodes, nodes))
    groups = defaultdict(list)
    for position, group in enumerate(connected_components(graph, directed=False)[1][: len(samples)]):
        groups[int(group)].append(position)
    return [sorted(group, key=lambda position: samples[position].record.key) for group in groups.values()]


def _describe(
    split: str, held: list[Checked], pool: list[Checked], classes: list[str], fraction: float, seed: int
) -> list[str]:
    patients = sum(sample.record.patient is not None for sample in pool)
    known = f"the patients known for {patients} of them kept whole"
    if not patients:
        known = "no patients known, so one may be on both sides"
    notes = [
        f"{split}: the source has none; {len(held)} of {len(pool)} training images were held out "
        f"(fraction {fraction:g}, seed {seed}, stratified by class, {known})"
    ]
    counts = _per_class(held, len(classes))
    notes += [
        f"{split}: class {name!r} has no image here, since too few images or patients of it could be held out"
        for name, count in zip(classes, counts, strict=True)
        if not count
    ]
    return notes


def _per_class(samples: Iterable[Checked], classes: int) -> np.ndarray:
    """[C] float64: the number of samples of each class."""
    counts = Counter(sample.record.label for sample in samples)
    return np.array([counts[label] for label in range(classes)], dtype=np.float64)
