"""Which split each image is in: the source's own, with a missing val or test split held out from train, never a patient torn."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from harness.data.check import Checked
from harness.data.keyed import keyed_rank
from harness.data.sources import SPLITS
from harness.errors import UserError


@dataclass(frozen=True)
class HoldOut:
    """What part of each class's training images becomes a split that the source lacks; 0 leaves it missing."""

    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"fractions: val {self.val_fraction} and test {self.test_fraction} must be at least 0 and sum to less than 1"
            )


def split_samples(
    samples: list[Checked], classes: list[str], hold_out: HoldOut
) -> tuple[dict[str, list[Checked]], list[str]]:
    """Samples by split, in the order train, val, test, without empty splits; and notes on what was decided.

    A source without any split is all train to begin with. A source with a test split only stays so.

    Raises:
        UserError: an image or a patient is in two splits, or a class has no training image.
    """
    splits: dict[str, list[Checked]] = {split: [] for split in SPLITS}
    for sample in samples:
        splits[sample.record.split or "train"].append(sample)
    _refuse_leaks(splits)
    notes = _copies(splits)
    if pool := splits["train"]:
        _refuse_empty_classes(pool, classes)
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
    return {split: members for split, members in splits.items() if members}, notes


def _hold_out(samples: list[Checked], target: np.ndarray, split: str, seed: int) -> np.ndarray:
    """[N] bool: samples to hold out, about `target` [C] per class, in whole groups that share a patient or an image.

    Groups are offered in a random order; one is taken where that brings the counts nearer to the target, and where each
    class keeps a sample. (scikit-learn's StratifiedGroupKFold knows fractions of 1/k only, and may leave a class with none.)
    """
    target = np.maximum(target, 1)  # a rare class is tested too
    groups = _groups(samples)
    left, taken = _per_class(samples, len(target)), np.zeros_like(target)
    held = np.zeros(len(samples), dtype=bool)
    for members in sorted(groups, key=lambda group: keyed_rank(split, seed, samples[group[0]].record.key)):
        counts = _per_class((samples[position] for position in members), len(target))
        nearer = (np.abs(taken + counts - target) / target).sum() < (np.abs(taken - target) / target).sum()
        if nearer and (left - counts >= 1)[counts > 0].all():
            held[members] = True
            taken, left = taken + counts, left - counts
    return held


def _groups(samples: list[Checked]) -> list[list[int]]:
    """Positions of samples that belong together: linked by a patient or by the same pixels, directly or over others."""
    first_with: dict[tuple[str, str], int] = {}
    linked_to = list(range(len(samples)))  # a forest: each tree is a group

    def root(position: int) -> int:
        while linked_to[position] != position:
            linked_to[position] = position = linked_to[linked_to[position]]
        return position

    for position, sample in enumerate(samples):
        links = [("image", sample.pixels)] + ([("patient", sample.record.patient)] if sample.record.patient else [])
        for link in links:
            linked_to[root(position)] = root(first_with.setdefault(link, position))
    groups = defaultdict(list)
    for position in range(len(samples)):
        groups[root(position)].append(position)
    return [sorted(group, key=lambda position: samples[position].record.key) for group in groups.values()]


def _refuse_leaks(splits: dict[str, list[Checked]]) -> None:
    images: dict[str, tuple[str, Checked]] = {}
    patients: dict[str, tuple[str, Checked]] = {}
    for split, members in splits.items():
        for sample in members:
            other_split, other = images.setdefault(sample.pixels, (split, sample))
            if other_split != split:
                raise UserError(
                    f"the same image is in {other_split} ({other.record.path}) and in {split} ({sample.record.path}); "
                    "keep it in one of them"
                )
            if sample.record.patient is None:
                continue
            other_split, other = patients.setdefault(sample.record.patient, (split, sample))
            if other_split != split:
                raise UserError(
                    f"patient {sample.record.patient!r} is in {other_split} ({other.record.path}) and in {split} "
                    f"({sample.record.path}); keep all images of a patient in one split"
                )


def _refuse_empty_classes(train: list[Checked], classes: list[str]) -> None:
    counts = _per_class(train, len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise UserError(f"class {empty[0]!r} has no training image; add some, or leave the class out")


def _copies(splits: dict[str, list[Checked]]) -> list[str]:
    """Notes on images that occur several times within a split, which is allowed."""
    notes = []
    for split, members in splits.items():
        labels = defaultdict(set)
        for sample in members:
            labels[sample.pixels].add(sample.record.label)
        if copies := len(members) - len(labels):
            notes.append(f"{split}: {copies} images are copies of others in this split; all are kept")
        if contradictory := sum(len(found) > 1 for found in labels.values()):
            notes.append(f"{split}: {contradictory} images occur under several classes")
    return notes


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
    """[C] float64: how many samples of each class there are."""
    counts = Counter(sample.record.label for sample in samples)
    return np.array([counts[label] for label in range(classes)], dtype=np.float64)
