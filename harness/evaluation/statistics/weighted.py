"""Metrics of many resamples at once, from sums of samples weighted by how often a resample holds their cluster.

A resample is a column of counts of clusters, so a sum over its samples is a product with a sparse matrix of values by group and
cluster, and a metric a few sums per class. It gives exactly the metric of the resampled samples, without making them.
"""

import re
from collections.abc import Callable
from functools import cached_property

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


class Resampled:
    """Predictions under resampling of their clusters.

    Args:
        clusters: [N] int, each sample's cluster of M. counts: [M, B] float32, times that a resample holds a cluster.
    """

    def __init__(self, of: Predicted, clusters: np.ndarray, counts: np.ndarray) -> None:
        self.of, self.clusters, self.counts = of, clusters, counts
        self.samples = self.sum(np.zeros(len(clusters), np.int64), 1)[0]  # [B]

    def sum(
        self, groups: np.ndarray, size: int, values: np.ndarray | None = None, chosen: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """Sums [size, B] of values (ones by default), by group, over the chosen samples; float32, in which counts are exact.

        Args:
            groups, values: [n] of the n chosen samples.
        """
        cells = np.ones(len(groups), np.float32) if values is None else values.astype(np.float32)
        matrix = sparse.csr_matrix((cells, (groups, self.clusters[chosen])), (size, len(self.counts)))
        return matrix @ self.counts

    @property
    def correct(self) -> np.ndarray:
        """[N] bool."""
        return self.of.predicted == self.of.labels

    @cached_property
    def counts_of_classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """True positives, labels and predictions of each class, [C, B] each, float64."""
        classes = len(self.of.classes)
        right = self.sum(self.of.labels, classes, self.correct)
        by_label, by_prediction = (self.sum(groups, classes) for groups in (self.of.labels, self.of.predicted))
        return right.astype(np.float64), by_label.astype(np.float64), by_prediction.astype(np.float64)

    @cached_property
    def rankings(self) -> tuple[np.ndarray, np.ndarray]:
        """Macro one-vs-rest AUROC and average precision [B] each."""
        found = [self._ranking(label) for label in distinguishable(self.of)]
        if not found:
            nothing = np.full(len(self.samples), np.nan)
            return nothing, nothing
        return nan_mean(np.stack([areas for areas, _ in found])), nan_mean(np.stack([precise for _, precise in found]))

    def _ranking(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision [B] each of a class against the rest; NaN where a resample lacks either.

        Negatives are summed between the K distinct scores of positives, which is all that both need.
        """
        scores, positive = self.of.log_odds[:, label], self.of.labels == label
        levels, level = np.unique(scores[positive], return_inverse=True)
        place = np.searchsorted(levels, scores[~positive])
        ties = levels[np.minimum(place, len(levels) - 1)] == scores[~positive]
        positives = self.sum(level, len(levels), chosen=positive)
        negatives = self.sum(2 * place + ties, 2 * len(levels) + 1, chosen=~positive)
        below = np.cumsum(negatives, axis=0)[0:-1:2]
        every_positive = positives.sum(axis=0, dtype=np.float64)
        every_negative = negatives.sum(axis=0, dtype=np.float64)
        wins = (positives * (below + 0.5 * negatives[1::2])).sum(axis=0, dtype=np.float64)
        found = np.cumsum(positives[::-1], axis=0)[::-1]  # positives of at least the level's score
        shown = found + (negatives.sum(axis=0) - below)
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
        of, total = resampled.of, np.zeros(len(resampled.samples))
        confidences = of.probabilities.T if by_class else [of.probabilities.max(axis=1)]
        for label, confidence in enumerate(confidences):
            off = ((of.labels == label) if by_class else resampled.correct) - confidence
            bins = calibration_bins(confidence)
            gaps = resampled.sum(bins, CALIBRATION_BINS, off) / resampled.samples
            if of_calibrated:
                gaps = gaps - (np.bincount(bins, off, CALIBRATION_BINS) / len(off))[:, None]
            total += np.abs(gaps).sum(axis=0)
        return total / len(confidences)

    return weighted


def _mean_of(values: Callable[[Predicted], np.ndarray]) -> WeightedMetric:
    def weighted(resampled: Resampled) -> np.ndarray:
        of_samples = values(resampled.of)
        total = resampled.sum(np.zeros(len(of_samples), np.int64), 1, of_samples)[0]
        return np.asarray(total / resampled.samples, np.float64)

    return weighted


def _quadratic_kappa(resampled: Resampled) -> np.ndarray:
    """One minus observed over expected squared distance; expected ones follow from the moments of labels and predictions."""
    _, by_label, by_prediction = resampled.counts_of_classes
    n, grades = by_label.sum(axis=0), np.arange(len(by_label), dtype=np.float64)
    first = [grades @ counts / n for counts in (by_label, by_prediction)]
    second = [grades**2 @ counts / n for counts in (by_label, by_prediction)]
    expected = second[0] + second[1] - 2 * first[0] * first[1]
    observed = _mean_of(lambda of: np.square(of.predicted - of.labels))(resampled)
    return 1 - _ratio(observed, expected)


WEIGHTED: dict[str, WeightedMetric] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "auroc": _auroc,
    "average_precision": _average_precision,
    "mcc": _mcc,
    "ece": _calibration(of_calibrated=False, by_class=False),
    "classwise_ece": _calibration(of_calibrated=False, by_class=True),
    "brier": _mean_of(squared_distances),
    "quadratic_kappa": _quadratic_kappa,
    "mae": _mean_of(lambda of: np.abs(of.predicted - of.labels)),
}
NOISE = {
    "ece": _calibration(of_calibrated=True, by_class=False),
    "classwise_ece": _calibration(of_calibrated=True, by_class=True),
}
ORDINAL = ("quadratic_kappa", "mae")
