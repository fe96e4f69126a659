"""Conformal prediction sets, which hold the label of a new sample with a chosen probability: LAC, APS and RAPS.

LAC: Sadinle et al., arXiv 1609.00451. APS: Romano et al., arXiv 2006.02544. RAPS: Angelopoulos et al., arXiv 2009.14193. The
latter two take a random part of a class's own probability, without which they hold labels too often where classes are few.

The threshold comes from samples that neither adapted the model nor test the sets: half of the test split's patients, by `halves`.
The validation split is no such part: recipes choose an epoch or a weight by it, and runs do not record its predictions.
Since one half is one draw, `repeated_sets` averages over many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.bootstrap import independent
from vipbench.harness.evaluation.statistics.intervals import Interval, wilson
from vipbench.harness.evaluation.statistics.weighted import nan_mean

COVERAGE = 0.9
HALVES = 100
PENALTY, UNPENALISED = 0.1, 1  # of RAPS: lambda and k_reg


@dataclass(frozen=True)
class PredictionSets:
    """Sets of n test samples.

    Attributes:
        score: lac, aps or raps. wanted: the coverage that the threshold is for. threshold: inf where calibration is too small.
        sets: [n, C] bool. calibration: the number of samples that gave the threshold.
        coverage: the share of sets that hold the label, with its interval. size: the mean size.
        coverage_by_class: as coverage, None for a class without samples.
    """

    score: str
    wanted: float
    threshold: float
    sets: np.ndarray
    calibration: int
    coverage: float
    interval: Interval | None
    size: float
    coverage_by_class: dict[str, float | None]


def conformal_sets(
    score: str,
    calibration: Predicted,
    test: Predicted,
    clusters: np.ndarray | None = None,
    wanted: float = COVERAGE,
    seed: int = 0,
) -> PredictionSets:
    """The prediction sets of test samples, with a threshold from calibration samples of the same kind.

    Args:
        clusters: [n] int of the test samples, for the interval.
        seed: of the random parts.
    """
    rng = np.random.default_rng(seed)
    scores = SCORES[score](calibration.probabilities, rng.random((len(calibration.labels), 1)))
    threshold = _threshold(scores[np.arange(len(scores)), calibration.labels], wanted)
    sets = SCORES[score](test.probabilities, rng.random((len(test.labels), 1))) <= threshold
    held = sets[np.arange(len(sets)), test.labels]
    by_class = {
        name: float(held[test.labels == label].mean()) if (test.labels == label).any() else None
        for label, name in enumerate(test.classes)
    }
    return PredictionSets(
        score,
        wanted,
        threshold,
        sets,
        len(scores),
        float(held.mean()),
        wilson(held, clusters),
        float(sets.sum(axis=1).mean()),
        by_class,
    )


@dataclass(frozen=True)
class RepeatedSets:
    """Prediction sets over many random halves of the same samples, with the threshold from one half and tested on the other.

    Attributes:
        score, wanted: as in `PredictionSets`. repeats: the number of halves. patients: these are halved, not samples.
        calibration, test: the mean numbers of samples that gave the threshold and that tested it.
        coverage, size: means over halves, each with the ends of the central 95% of them.
        coverage_by_class: means over the halves that have samples of the class, None where none has.
    """

    score: str
    wanted: float
    repeats: int
    patients: bool
    calibration: float
    test: float
    coverage: float
    coverage_range: tuple[float, float]
    size: float
    size_range: tuple[float, float]
    coverage_by_class: dict[str, float | None]

    @property
    def worst(self) -> tuple[str, float] | None:
        """The class whose samples' sets hold the label least often, and how often; None without samples."""
        known = [(mean, name) for name, mean in self.coverage_by_class.items() if mean is not None]
        return min(known)[::-1] if known else None


def repeated_sets(
    score: str,
    of: Predicted,
    clusters: np.ndarray | None = None,
    wanted: float = COVERAGE,
    repeats: int = HALVES,
    seed: int = 0,
) -> RepeatedSets:
    """The prediction sets of samples, averaged over random halves; the random parts are drawn once.

    Args:
        clusters: [N] int, patients, which stay whole; None: each sample is one.
    """
    samples, classes = of.logits.shape
    scores = SCORES[score](of.probabilities, np.random.default_rng(seed).random((samples, 1)))
    own = scores[np.arange(samples), of.labels]
    counts, coverages, sizes, by_class = [], [], [], []
    for place in range(repeats):
        calibration, test = halves(samples, clusters, seed + place)
        threshold = _threshold(own[calibration], wanted)
        held, labels = own[test] <= threshold, of.labels[test]
        counts.append(calibration.sum())
        coverages.append(held.mean())
        sizes.append((scores[test] <= threshold).sum() / len(held))
        there = np.bincount(labels, minlength=classes)
        by_class.append(np.where(there > 0, np.bincount(labels, held, classes) / np.maximum(there, 1), np.nan))
    means = nan_mean(np.stack(by_class))
    calibrating = float(np.mean(counts))
    return RepeatedSets(
        score,
        wanted,
        repeats,
        not independent(clusters),
        calibrating,
        samples - calibrating,
        float(np.mean(coverages)),
        _central(coverages),
        float(np.mean(sizes)),
        _central(sizes),
        {name: None if np.isnan(mean) else float(mean) for name, mean in zip(of.classes, means, strict=True)},
    )


def _central(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the central 95% of values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def halves(samples: int, clusters: np.ndarray | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Masks [N] bool of a random half of the clusters, for calibration, and of the other, for test."""
    codes = np.arange(samples) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    number = int(codes.max()) + 1
    calibration = (np.random.default_rng(seed).permutation(number) < number // 2)[codes]
    return calibration, ~calibration


def _threshold(scores: np.ndarray, wanted: float) -> float:
    """The score that a new sample's exceeds with a probability of at most 1 - wanted; infinite where there are too few."""
    place = int(np.ceil((len(scores) + 1) * wanted - 1e-9))
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else float("inf")


def _lac(probabilities: np.ndarray, part: np.ndarray) -> np.ndarray:
    return 1 - probabilities


def _aps(probabilities: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The probability of all classes that are more probable, and a part [n, 1] of the class's own."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    scores = np.empty_like(probabilities)
    np.put_along_axis(scores, order, np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1), axis=1)
    return scores - (1 - part) * probabilities


def _raps(probabilities: np.ndarray, part: np.ndarray) -> np.ndarray:
    ranks = np.argsort(np.argsort(-probabilities, axis=1, kind="stable"), axis=1) + 1
    return _aps(probabilities, part) + PENALTY * np.maximum(0, ranks - UNPENALISED)


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"lac": _lac, "aps": _aps, "raps": _raps}
