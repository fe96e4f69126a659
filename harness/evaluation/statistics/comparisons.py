"""Paired comparisons of two methods on the same samples: a difference with its interval, a p-value, and corrections of many."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import convolve
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom
from statsmodels.stats.multitest import multipletests

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.bootstrap import independent, over_patients, replicate
from vipbench.harness.evaluation.statistics.delong import delong
from vipbench.harness.evaluation.statistics.intervals import (
    BCA,
    CONFIDENCE,
    OVER_SEEDS,
    Interval,
    effective_samples,
    number_of_clusters,
    spread_over_seeds,
)
from vipbench.harness.evaluation.statistics.weighted import weighted_metric

RESAMPLES = 4000  # more than for an interval, so that small p-values can be told apart
MCNEMAR = "McNemar (exact)"
PERMUTATION = "exact permutation over patients"
DELONG = "DeLong"


@dataclass(frozen=True)
class Comparison:
    """The difference of a metric between two methods, first minus second.

    Attributes:
        interval: of the difference; None where it does not vary.
        p: two-sided, of no difference; None where the test is undefined. test: its name.
        samples: paired ones, N.
    """

    metric: str
    difference: float
    interval: Interval | None
    p: float | None
    test: str
    samples: int


def compare(
    metric: str, first: Predicted, second: Predicted, clusters: np.ndarray | None = None, seed: int = 0
) -> Comparison | None:
    """Compare two methods by their predictions of the same samples, in the same order; None where the metric has no comparison.

    Accuracy: exact McNemar test, over patients an exact permutation test. Binary AUROC: DeLong. Others: paired bootstrap.

    Args:
        clusters: [N] int, the patient of each sample; None: all samples are independent.
    """
    _check_paired([first], [second])
    if weighted_metric(metric, first) is None:
        return None
    if metric == "auroc" and len(first.classes) == 2:
        return _compare_areas(first, second, clusters)
    own, other = replicate([metric], [first, second], clusters, seed, RESAMPLES)[metric]
    difference = own - other
    name = f"paired {BCA}" + over_patients(clusters)
    ends = difference.interval()
    interval = Interval(*ends, name) if ends else None
    if metric == "accuracy":
        right, wrong = first.predicted == first.labels, second.predicted == second.labels
        test = MCNEMAR if independent(clusters) else PERMUTATION
        p: float | None = sign_flip_test(right.astype(int) - wrong, clusters)
    else:
        p, test = difference.p_value(), name
    return Comparison(metric, difference.estimate, interval, p, test, len(first.labels))


def compare_over_seeds(
    metric: str,
    first: Sequence[Predicted],
    second: Sequence[Predicted],
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> Comparison | None:
    """Compare two methods by runs of several seeds, run by run, as `interval_over_seeds` does.

    Args:
        first, second: S runs each; those at one place share their seed. Of one pair, the comparison is that of `compare`.
    """
    _check_paired(first, second)
    if len(first) == 1:
        return compare(metric, first[0], second[0], clusters, seed)
    if weighted_metric(metric, first[0]) is None:
        return None
    replicates = replicate([metric], [*first, *second], clusters, seed, RESAMPLES)[metric]
    pairs = zip(replicates[: len(first)], replicates[len(first) :], strict=True)
    differences = [own - other for own, other in pairs]
    mean, samples = float(np.mean([own.estimate for own in differences])), len(first[0].labels)
    name = OVER_SEEDS + over_patients(clusters)
    spread = spread_over_seeds(differences, number_of_clusters(first[0], clusters))
    if spread is None:
        return Comparison(metric, mean, None, None, name, samples)
    reach = spread.reach(CONFIDENCE)
    return Comparison(metric, mean, Interval(mean - reach, mean + reach, name), spread.p_value(mean), name, samples)


def sign_flip_test(differences: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The exact two-sided p-value of whole-numbered paired differences [N], when each cluster's sum might have the other sign.

    The distribution of the sum over all sign flips is a convolution of binomials, one per size of the clusters' sums. With
    differences of correctness and independent samples it is McNemar's exact test.
    """
    codes = np.arange(len(differences)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(codes, differences).round().astype(np.int64)
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    distribution = np.ones(1)  # of (the sum of sizes + the flipped sum) / 2
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(size * count + 1)
        steps[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = convolve(distribution, steps)
    flipped = 2 * np.arange(len(distribution)) - (len(distribution) - 1)
    return float(np.clip(distribution[np.abs(flipped) >= abs(sums.sum())].sum(), 0, 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment (1979) of all p-values of a table; None where there is none, which counts for nothing."""
    known = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1].tolist() if known else ())
    return [None if p is None else next(adjusted) for p in p_values]


def false_superiority(first: Predicted, second: Predicted, clusters: np.ndarray | None = None) -> float:
    """The probability that the method with the higher accuracy is not the better one (arXiv 2505.04720), at most 0.5.

    The four outcomes of a sample (both right, only the first, only the second, none) have a multinomial distribution with a
    uniform Dirichlet prior. The method is the better one where its own outcome is the more probable of the two in which they
    differ, and the share of that one among the two has a beta posterior. With patients, outcomes count as those of the effective
    number of samples.
    """
    _check_paired([first], [second])
    won = (first.predicted == first.labels).astype(int) - (second.predicted == second.labels)
    share = 1.0 if independent(clusters) else effective_samples(won, np.asarray(clusters)) / len(won)
    more, less = sorted((float(np.sum(won > 0)), float(np.sum(won < 0))), reverse=True)
    return float(beta.cdf(0.5, 1 + share * more, 1 + share * less))


def _check_paired(first: Sequence[Predicted], second: Sequence[Predicted]) -> None:
    assert len(first) == len(second) > 0
    for of in (*first, *second):
        assert np.array_equal(of.labels, first[0].labels) and list(of.classes) == list(first[0].classes), "not paired"


def _compare_areas(first: Predicted, second: Predicted, clusters: np.ndarray | None) -> Comparison:
    positive, samples = first.labels == 1, len(first.labels)
    test = DELONG + over_patients(clusters)
    if positive.all() or not positive.any():
        return Comparison("auroc", float("nan"), None, None, test, samples)
    areas, covariance = delong([first.log_odds[:, 1], second.log_odds[:, 1]], positive, clusters)
    difference = float(areas[0] - areas[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if not variance > 1e-18:
        return Comparison("auroc", difference, None, None, test, samples)
    error = float(np.sqrt(variance))
    reach = error * float(ndtri((1 + CONFIDENCE) / 2))
    p = float(2 * ndtr(-abs(difference) / error))
    return Comparison("auroc", difference, Interval(difference - reach, difference + reach, test), p, test, samples)
