"""The worth of symptoms on labelled images, and the choice of those to keep, cross-validated within these images.

An image goes to the class with the highest mean cosine of its symptoms (zero-shot classification with symptoms); the loss of a
set is the cross-entropy of these means times the backbone's logit scale. All of it is numpy, on image-text cosines [N, P].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logsumexp
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedGroupKFold

from vipbench.harness.errors import UserError

FEWEST_IMAGES = 4  # of a class: with fewer, what is held out decides nothing
MOST_FOLDS = 5
LEAST_GAIN = 1e-3  # in loss on held-out images, of a step
LEAST_AUROC = 0.55  # of a symptom that is added: its class against the rest

Kept = list[list[int]]  # for each class the columns of the symptoms that are kept, in [N, P] of the class


@dataclass(frozen=True)
class Step:
    """A symptom added to a class, dropped, or exchanged (both); `gain`: the loss it saves on images held out from its choice."""

    label: int
    kept: list[int]
    gain: float


@dataclass(frozen=True)
class Choice:
    """The symptoms kept, the loss with them on all images, and the steps that led there from `start`."""

    kept: Kept
    loss: float
    start: Kept
    steps: list[Step]


def fold_numbers(labels: np.ndarray, patients: Sequence[str | None], classes: Sequence[str]) -> np.ndarray:
    """Divide images into folds with about the same share of each class, all images of a patient in one.

    Returns:
        [N] the fold of each image; there are `MOST_FOLDS`, or as many as the class with the fewest patients has.

    Raises:
        UserError: a class has fewer than `FEWEST_IMAGES` images, or all of one patient.
    """
    holders = [("image", str(row)) if name is None else ("patient", name) for row, name in enumerate(patients)]
    numbers = {holder: number for number, holder in enumerate(dict.fromkeys(holders))}
    groups = np.array([numbers[holder] for holder in holders])
    count = MOST_FOLDS
    for label, name in enumerate(classes):
        own = groups[labels == label]
        if len(own) < FEWEST_IMAGES:
            raise UserError(
                f"class {name!r} has {len(own)} training images; improving takes {FEWEST_IMAGES} of each class"
            )
        count = min(count, len(set(own.tolist())))
        if count < 2:
            raise UserError(
                f"class {name!r} has training images of one patient only; improving takes two patients or more"
            )
    folds = np.empty(len(labels), dtype=np.int64)
    for number, (_, held_out) in enumerate(StratifiedGroupKFold(count).split(labels[:, None], labels, groups)):
        folds[held_out] = number
    return folds


def class_scores(cosines: Sequence[np.ndarray], kept: Kept) -> np.ndarray:
    """Compute the mean cosines [N, C] with the kept symptoms of each class."""
    return np.stack([own[:, columns].mean(axis=1) for own, columns in zip(cosines, kept, strict=True)], axis=1)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of images whose class has the highest of the scores [N, C]."""
    return float((scores.argmax(axis=1) == labels).mean())


def losses(scores: np.ndarray, labels: np.ndarray, scale: float) -> np.ndarray:
    """Compute the cross-entropy [N] of scores [N, C]."""
    return -log_softmax(scale * scores, axis=1)[np.arange(len(labels)), labels]


def aurocs(cosines: np.ndarray, of_class: np.ndarray) -> np.ndarray:
    """Compute the AUROC [P] of each column of cosines [N, P]: images of the class against the others; NaN without either."""
    inside, outside = int(of_class.sum()), int((~of_class).sum())
    if not inside or not outside:
        return np.full(cosines.shape[1], np.nan)
    ranks = rankdata(cosines, axis=0)[of_class].sum(axis=0)
    return np.asarray((ranks - inside * (inside + 1) / 2) / (inside * outside))


def leave_one_out_margins(cosines: Sequence[np.ndarray], labels: np.ndarray) -> list[np.ndarray]:
    """Compute how much each symptom adds to the mean margin of all images: [P] of each class; NaN where it is the only one.

    The margin of an image is the score of its class minus the highest of the others.
    """
    scores = class_scores(cosines, [list(range(own.shape[1])) for own in cosines])
    whole, found = _mean_margin(scores, labels), []
    for label, own in enumerate(cosines):
        values = np.full(own.shape[1], np.nan)
        for column in range(own.shape[1]) if own.shape[1] > 1 else ():
            without = scores.copy()
            without[:, label] = np.delete(own, column, axis=1).mean(axis=1)
            values[column] = whole - _mean_margin(without, labels)
        found.append(values)
    return found


def confused_pairs(scores: np.ndarray, labels: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """List the pairs of classes taken for each other most often, at most `most`: (class, other class, images)."""
    guesses = scores.argmax(axis=1)
    mistakes = np.sort(np.stack([labels, guesses], axis=1)[guesses != labels], axis=1)
    pairs, counts = np.unique(mistakes, axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:most]
    return [(int(pairs[row, 0]), int(pairs[row, 1]), int(counts[row])) for row in order]


def choose(
    cosines: Sequence[np.ndarray], current: Kept, labels: np.ndarray, folds: np.ndarray, scale: float, most: int
) -> Choice:
    """Choose which symptoms of each class to keep, at most `most`, out of all columns of its cosines [N, P].

    Step by step from the current ones, and from those of the highest AUROC; the outcome with the lower loss is taken, the
    current symptoms where neither is lower. A step is the change of one class that gains most; for each fold it is picked on the
    images of the other folds and credited with what it gains there, so that only steps are made that generalise.
    """
    areas = [aurocs(own, labels == label) for label, own in enumerate(cosines)]
    best = [np.argsort(-own, kind="stable")[:most].tolist() for own in areas]
    addable = [np.flatnonzero(own >= LEAST_AUROC).tolist() for own in areas]
    as_it_is = Choice(current, float(losses(class_scores(cosines, current), labels, scale).mean()), current, [])
    found = [_search(cosines, start, addable, labels, folds, scale, most) for start in (current, best)]
    return min([as_it_is, *found], key=lambda choice: choice.loss)


def _search(
    cosines: Sequence[np.ndarray],
    start: Kept,
    addable: Kept,
    labels: np.ndarray,
    folds: np.ndarray,
    scale: float,
    most: int,
) -> Choice:
    """Take the step of the highest cross-validated gain, again and again, until none gains `LEAST_GAIN`.

    `addable`: the columns of each class that a step may add.
    """
    kept, steps = list(start), list[Step]()
    scores = class_scores(cosines, kept)
    in_fold = (folds == np.arange(int(folds.max()) + 1)[:, None]).astype(np.float64)  # [F, N]
    touched = [label for label, own in enumerate(cosines) if own.shape[1] > 1]
    while True:
        loss = losses(scores, labels, scale)
        found = []
        for label in touched:
            others = logsumexp(scale * np.delete(scores, label, axis=1), axis=1)
            logits = scale * scores[np.arange(len(labels)), labels]
            for options in _options(kept[label], addable[label], most):
                values = scale * np.stack([cosines[label][:, columns].mean(axis=1) for columns in options], axis=1)
                own = np.where((labels == label)[:, None], values, logits[:, None])
                gains = in_fold @ (loss[:, None] - np.logaddexp(others[:, None], values) + own)  # [F, options]
                found.append(_cross_validated(label, options, gains, len(labels)))
        best = max(found, key=lambda step: step.gain, default=None)
        if best is None or best.gain < LEAST_GAIN:
            return Choice(kept, float(loss.mean()), start, steps)
        steps.append(best)
        kept[best.label] = best.kept
        scores[:, best.label] = cosines[best.label][:, best.kept].mean(axis=1)


def _options(kept: list[int], addable: list[int], most: int) -> Iterator[list[list[int]]]:
    """Yield what a class could keep instead: one more, one fewer, one exchanged."""
    new = [column for column in addable if column not in kept]
    fewer = [[column for column in kept if column != out] for out in kept]
    if new and len(kept) < most:
        yield [[*kept, column] for column in new]
    if len(kept) > 1:
        yield fewer
    if new:
        yield [[*rest, column] for rest in fewer for column in new]


def _cross_validated(label: int, options: list[list[int]], gains: np.ndarray, images: int) -> Step:
    """Pick the option of the highest gain; credit what the pick made without a fold gains in it.

    Args:
        gains: [F, options] summed over the images of each fold.
    """
    total = gains.sum(axis=0)
    picked = (total - gains).argmax(axis=1)
    credited = gains[np.arange(len(gains)), picked].sum() / images
    return Step(label, options[int(total.argmax())], float(credited))


def _mean_margin(scores: np.ndarray, labels: np.ndarray) -> float:
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    return float((scores[rows, labels] - others.max(axis=1)).mean())
