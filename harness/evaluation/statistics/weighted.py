"""Metrics of many resamples at once, from sums of samples weighted by how often a resample holds their cluster.

A resample is a column of counts of clusters, so a sum over its samples is a product with a sparse matrix of values by group and
cluster, and a metric a few sums per class. It gives exactly the metric of the resampled samples, without making them.
"""

import re
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy import sparse

from vipbench.harness.evaluation.metrics import (
    CALIBRATION_BINS,
    Predicted,
    calibration_bins,
    distinguishable,
    squared_distances,
)

OF_A_CLASS = re.compile(r"(sensitivity|specificity)\[(.+)\]", re.DOTALL)
OF_CALIBRATED = " of a calibrated model"


class Clustered:
    """Predictions of N samples, each in one of M clusters, as sparse matrices [groups, M] whose products with counts are sums.

    Each matrix is made once, for all resamples; those that no metric asks for are never made.

    Args:
        clusters: [N] int, each sample's. number: M.
    """

    def __init__(self, of: Predicted, clusters: np.ndarray, number: int) -> None:
        self.of, self.clusters, self.number = of, clusters, number

    def _matrix(
        self,
        groups: np.ndarray,
        size: int,
        values: np.ndarray | None = None,
        chosen: np.ndarray | slice = slice(None),
    ) -> sparse.csr_matrix:
        """The matrix [size, M] float32, in which counts are exact, of values (ones by default) by group and cluster.

        Args:
            groups, values: [n] of the n chosen samples.
        """
        cells = np.ones(len(groups), np.float32) if values is None else values.astype(np.float32)
        return sparse.csr_matrix((cells, (groups, self.clusters[chosen])), (size, self.number))

    @cached_property
    def samples(self) -> sparse.csr_matrix:
        return self._matrix(np.zeros(len(self.clusters), np.int64), 1)

    @cached_property
    def classes(self) -> list[sparse.csr_matrix]:
        """Matrices of true positives, labels and predictions by class, [C, M] each."""
        of, size = self.of, len(self.of.classes)
        right = self._matrix(of.labels, size, of.predicted == of.labels)
        return [right, self._matrix(of.labels, size), self._matrix(of.predicted, size)]

    @cached_property
    def rankings(self) -> list[tuple[sparse.csr_matrix, ...]]:
        """Matrices of positives [K, M], lower negatives [K + 1, M] and tied negatives [K, M], for each class that has both.

        Groups are the K distinct scores of positives, from the lowest, and for negatives the place above them all: all that
        AUROC and average precision need.
        """
        found = []
        for label in distinguishable(self.of):
            scores, positive = self.of.log_odds[:, label], self.of.labels == label
            levels, level = np.unique(scores[positive], return_inverse=True)
            place = np.searchsorted(levels, scores[~positive])
            tied = np.append(levels, np.nan)[place] == scores[~positive]
            positives = self._matrix(level, len(levels), chosen=positive)
            negatives = self._matrix(place + tied, len(levels) + 1, chosen=~positive)
            ties = self._matrix(place[tied], len(levels), chosen=np.flatnonzero(~positive)[tied])
            found.append((positives, negatives, ties))
        return found

    @cached_property
    def top_gaps(self) -> list[sparse.csr_matrix]:
        """The matrix of correctness less confidence, by bin of the confidence."""
        return [self._gaps(self.of.predicted == self.of.labels, self.of.probabilities.max(axis=1))]

    @cached_property
    def class_gaps(self) -> list[sparse.csr_matrix]:
        """The matrix of each class: whether it is the label, less its probability, by bin of the latter."""
        return [self._gaps(self.of.labels == label, own) for label, own in enumerate(self.of.probabilities.T)]

    def _gaps(self, true: np.ndarray, confidence: np.ndarray) -> sparse.csr_matrix:
        return self._matrix(calibration_bins(confidence), CALIBRATION_BINS, true - confidence)

    @cached_property
    def confidences(self) -> list[sparse.csr_matrix]:
        """Matrices [K, M] of samples and of errors by their K distinct confidences, the highest first."""
        levels, level = np.unique(-self.of.log_odds.max(axis=1), return_inverse=True)
        return [self._matrix(level, len(levels), values) for values in (None, self.of.predicted != self.of.labels)]

    @cached_property
    def distances(self) -> sparse.csr_matrix:
        """The matrix [3, M] of three distances of samples: that of `brier`, and the absolute and the squared one in classes."""
        off = self.of.predicted - self.of.labels
        values = np.concatenate([squared_distances(self.of), np.abs(off), np.square(off)])
        return self._matrix(np.repeat(np.arange(3), len(off)), 3, values, np.tile(np.arange(len(off)), 3))


class Resampled:
    """Predictions under resampling of their clusters.

    Args:
        counts: [M, B] float32, times that a resample holds a cluster.
    """

    def __init__(self, clustered: Clustered, counts: np.ndarray) -> None:
        self.clustered, self.counts = clustered, counts
        self.samples = (clustered.samples @ counts)[0]  # [B]

    @cached_property
    def counts_of_classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """True positives, labels and predictions of each class, [C, B] each, float64."""
        right, by_label, by_prediction = ((own @ self.counts).astype(np.float64) for own in self.clustered.classes)
        return right, by_label, by_prediction

    @cached_property
    def distances(self) -> np.ndarray:
        """The means [3, B] float64 of `Clustered.distances`."""
        return ((self.clustered.distances @ self.counts) / self.samples).astype(np.float64)

    @cached_property
    def rankings(self) -> tuple[np.ndarray, np.ndarray]:
        """Macro one-vs-rest AUROC and average precision [B] each."""
        found = [self._ranking(*(own @ self.counts for own in matrices)) for matrices in self.clustered.rankings]
        if not found:
            nothing = np.full(len(self.samples), np.nan)
            return nothing, nothing
        return nan_mean(np.stack([areas for areas, _ in found])), nan_mean(np.stack([precise for _, precise in found]))

    @staticmethod
    def _ranking(positives: np.ndarray, negatives: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision [B] each of a class against the rest; NaN where a resample lacks either.

        Args:
            positives, ties: [K, B]. negatives: [K + 1, B].
        """
        every_positive = positives.sum(axis=0, dtype=np.float64)
        every_negative = negatives.sum(axis=0, dtype=np.float64)
        below = _running_sums(negatives)[:-1]
        wins = (positives * (below + 0.5 * ties)).sum(axis=0, dtype=np.float64)
        found = _running_sums(positives[::-1].copy())[::-1]  # positives of at least the level's score
        shown = found + (negatives[-1] - below)
        precision = np.divide(found, shown, out=np.zeros_like(found), where=shown > 0)
        precise = (positives * precision).sum(axis=0, dtype=np.float64)
        return _ratio(wins, every_positive * every_negative), _ratio(
            np.where(every_negative > 0, precise, 0), np.where(every_negative > 0, every_positive, 0)
        )


WeightedMetric = Callable[[Resampled], np.ndarray]  # [B] float64, NaN where undefined


def weighted_metric(name: str, of: Predicted) -> WeightedMetric | None:
    """The weighted form of a metric, or of "sensitivity[CLASS]" and "specificity[CLASS]"; None where there is none.

    Metrics of ordinal classes have none for classes that are not.
    """
    if match := OF_A_CLASS.fullmatch(name):
        if match[2] not in of.classes:
            return None
        label, rate = of.classes.index(match[2]), _sensitivities if match[1] == "sensitivity" else _specificities
        return lambda resampled: rate(resampled)[label]
    if name in ORDINAL and not of.ordinal:
        return None
    return NOISE[name.removesuffix(OF_CALIBRATED)] if name.endswith(OF_CALIBRATED) else WEIGHTED.get(name)


def noise_of(name: str) -> str:
    """The name of a calibration error's values for a perfectly calibrated model."""
    return name + OF_CALIBRATED


def nan_mean(values: np.ndarray) -> np.ndarray:
    """The mean of a first axis over what is no NaN; NaN where there is nothing."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0).sum(axis=0), there.sum(axis=0))


def _running_sums(values: np.ndarray) -> np.ndarray:
    """Running sums [K, B] over the first axis, in place; row by row, as memory lies, several times as fast as `np.cumsum`."""
    for before, row in pairwise(values):
        row += before
    return values


def _ratio(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)


def _sensitivities(resampled: Resampled) -> np.ndarray:
    right, by_label, _ = resampled.counts_of_classes
    return _ratio(right, by_label)


def _specificities(resampled: Resampled) -> np.ndarray:
    right, by_label, by_prediction = resampled.counts_of_classes
    negatives = resampled.samples - by_label
    return _ratio(negatives - (by_prediction - right), negatives)


def _accuracy(resampled: Resampled) -> np.ndarray:
    right, by_label, _ = resampled.counts_of_classes
    return _ratio(right.sum(axis=0), by_label.sum(axis=0))


def _balanced_accuracy(resampled: Resampled) -> np.ndarray:
    return nan_mean(_sensitivities(resampled))


def _macro_f1(resampled: Resampled) -> np.ndarray:
    right, by_label, by_prediction = resampled.counts_of_classes
    return nan_mean(np.where(by_label > 0, _ratio(2 * right, by_label + by_prediction), np.nan))


def _auroc(resampled: Resampled) -> np.ndarray:
    return resampled.rankings[0]


def _average_precision(resampled: Resampled) -> np.ndarray:
    return resampled.rankings[1]


def _mcc(resampled: Resampled) -> np.ndarray:
    right, by_label, by_prediction = resampled.counts_of_classes
    n = by_label.sum(axis=0)
    covariance = n * right.sum(axis=0) - (by_label * by_prediction).sum(axis=0)
    spread = (n**2 - (by_label**2).sum(axis=0)) * (n**2 - (by_prediction**2).sum(axis=0))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros_like(n), where=spread > 0)


def _calibration(of_calibrated: bool, by_class: bool) -> WeightedMetric:
    """A calibration error; or, of a perfectly calibrated model, the one that the resampling of samples alone gives it.

    The latter is the error of the differences between the gaps of a resample and those of all samples.
    """

    def weighted(resampled: Resampled) -> np.ndarray:
        clustered, total = resampled.clustered, np.zeros(len(resampled.samples))
        matrices = clustered.class_gaps if by_class else clustered.top_gaps
        for matrix in matrices:
            gaps = (matrix @ resampled.counts) / resampled.samples
            if of_calibrated:
                gaps = gaps - matrix @ np.ones((clustered.number, 1)) / len(clustered.clusters)
            total += np.abs(gaps).sum(axis=0)
        return total / len(matrices)

    return weighted


def _aurc(resampled: Resampled) -> np.ndarray:
    """The mean risk over all coverages, summed by levels of confidence.

    In a level of n samples and e errors, behind N samples and E errors, the risk of the first i samples is (E + (i - N) e/n) / i,
    for i from N + 1 to N + n, which sums to e + (E - N e/n) (H(N + n) - H(N)) with harmonic numbers H.
    """
    samples, errors = (own @ resampled.counts for own in resampled.clustered.confidences)
    before, wrong = _running_sums(samples.copy()), _running_sums(errors.copy())
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, before[-1].max() + 1))])
    steps = harmonic[before.astype(np.intp)]
    steps[1:] -= steps[:-1]
    before -= samples  # in place, as below: these arrays are large, and the time goes into making them
    wrong -= errors
    risks = np.divide(errors, np.maximum(samples, 1), dtype=np.float64)
    risks *= before
    np.subtract(wrong, risks, out=risks)
    return _ratio(errors.sum(axis=0) + np.einsum("kb,kb->b", risks, steps), resampled.samples)


def _quadratic_kappa(resampled: Resampled) -> np.ndarray:
    """One minus observed over expected squared distance; expected ones follow from the moments of labels and predictions."""
    _, by_label, by_prediction = resampled.counts_of_classes
    n, grades = by_label.sum(axis=0), np.arange(len(by_label), dtype=np.float64)
    first = [grades @ counts / n for counts in (by_label, by_prediction)]
    second = [grades**2 @ counts / n for counts in (by_label, by_prediction)]
    expected = second[0] + second[1] - 2 * first[0] * first[1]
    return 1 - _ratio(resampled.distances[2], expected)


WEIGHTED: dict[str, WeightedMetric] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "auroc": _auroc,
    "average_precision": _average_precision,
    "mcc": _mcc,
    "ece": _calibration(of_calibrated=False, by_class=False),
    "classwise_ece": _calibration(of_calibrated=False, by_class=True),
    "brier": lambda resampled: resampled.distances[0],
    "aurc": _aurc,
    "quadratic_kappa": _quadratic_kappa,
    "mae": lambda resampled: resampled.distances[1],
}
NOISE = {
    "ece": _calibration(of_calibrated=True, by_class=False),
    "classwise_ece": _calibration(of_calibrated=True, by_class=True),
}
ORDINAL = ("quadratic_kappa", "mae")
