"""95% intervals of metrics, each with the name of its method; docs/statistics.md has the sources.

A run writes those of all its metrics to intervals.json.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.bootstrap import Replicates, independent, over_patients, replicate
from vipbench.harness.evaluation.statistics.delong import delong
from vipbench.harness.evaluation.statistics.weighted import NOISE, OF_A_CLASS, WEIGHTED, noise_of, weighted_metric
from vipbench.harness.system.plain_values import is_number

CONFIDENCE = 0.95
DIGITS = 6  # of ends that are stored
BY_CLASS = ("sensitivity", "specificity")
WILSON = "Wilson"
DELONG = "DeLong (logit)"
BCA = "BCa bootstrap"
DEVIATION = "normal bootstrap, bias taken off below"
OVER_SEEDS = "t over seeds and bootstrapped samples"
LEAST_P = 1e-9


@dataclass(frozen=True)
class Interval:
    """A 95% interval and the name of its method."""

    low: float
    high: float
    method: str

    def overlaps(self, other: "Interval") -> bool:
        """Check for a common value of two intervals."""
        return self.low <= other.high and other.low <= self.high


Intervals = dict[str, Interval | dict[str, Interval | None] | None]


def interval(metric: str, of: Predicted, clusters: np.ndarray | None = None, seed: int = 0) -> Interval | None:
    """The interval of one metric, or of "sensitivity[CLASS]" and "specificity[CLASS]".

    None where the metric has none: it is undefined, does not vary over resamples, or is a plugin's without a weighted form.

    Args:
        clusters: [N] int, the patient of each sample; None: all samples are independent.
    """
    if metric == "accuracy":
        return wilson(of.predicted == of.labels, clusters)
    if match := OF_A_CLASS.fullmatch(metric):
        found = _rates(match[1], of, clusters)
        return found.get(match[2])
    if metric == "auroc" and len(of.classes) == 2:
        return _delong(of, clusters)
    if weighted_metric(metric, of) is None:
        return None
    return _bootstrapped([metric], of, clusters, seed)[metric]


def intervals(of: Predicted, clusters: np.ndarray | None = None, seed: int = 0) -> Intervals:
    """The intervals of all metrics that have a method, by name; of sensitivity and specificity by class."""
    found: Intervals = {"accuracy": interval("accuracy", of, clusters)}
    names = [name for name in WEIGHTED if weighted_metric(name, of) is not None and name not in found]
    if len(of.classes) == 2:
        found["auroc"] = interval("auroc", of, clusters)
        names.remove("auroc")
    found |= _bootstrapped(names, of, clusters, seed)
    return found | {name: _rates(name, of, clusters) for name in BY_CLASS}


def to_json(found: Intervals) -> dict[str, Any]:
    """Intervals as JSON values: {metric: {low, high, method}}, by class where the metric is; those without are left out.

    Ends are rounded, so that they do not depend on the machine's last digits.
    """
    described: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, Interval):
            described[name] = _rounded(value)
        elif value:
            described[name] = {label: _rounded(own) for label, own in value.items() if own}
    return described


def _rounded(found: Interval) -> dict[str, Any]:
    return asdict(replace(found, low=round(found.low, DIGITS), high=round(found.high, DIGITS)))


def from_json(described: dict[str, Any]) -> Intervals:
    """The inverse of `to_json`. Raises TypeError where it is not of that form."""
    return {
        name: _read(value)
        if "low" in value and name not in BY_CLASS
        else {label: _read(own) for label, own in value.items()}
        for name, value in described.items()
    }


def _read(described: dict[str, Any]) -> Interval:
    found = Interval(**described)
    if not all(is_number(end) for end in (found.low, found.high)) or not isinstance(found.method, str):
        raise TypeError(f"{described} is no interval")
    return Interval(float(found.low), float(found.high), found.method)


def interval_over_seeds(
    metric: str, runs: Sequence[Predicted], clusters: np.ndarray | None = None, seed: int = 0
) -> Interval | None:
    """The interval of a metric's mean over runs that differ in their seed, for other seeds and other samples alike.

    Args:
        runs: predictions of the same samples in the same order. Of one run, the interval is that of `interval`.
    """
    if len(runs) == 1:
        return interval(metric, runs[0], clusters, seed)
    if any(weighted_metric(metric, of) is None for of in runs):
        return None
    replicates = replicate([metric], runs, clusters, seed)[metric]
    spread = spread_over_seeds(replicates, number_of_clusters(runs[0], clusters))
    if spread is None:
        return None
    mean, reach = float(np.mean([own.estimate for own in replicates])), spread.reach(CONFIDENCE)
    return Interval(*_bounded(metric, mean - reach, mean + reach), OVER_SEEDS + over_patients(clusters))


@dataclass(frozen=True)
class Spread:
    """The variance of a mean over seeds in two parts, each with its degrees of freedom.

    Attributes:
        seeds: the part that differs between seeds, with what each makes of single samples. samples: the part that all share.
    """

    seeds: float
    samples: float
    freedom_of_seeds: int
    freedom_of_samples: int

    def reach(self, confidence: float) -> float:
        """Half the width of the interval: each part with Student's t of its own degrees of freedom, added in quadrature."""
        tail = (1 + confidence) / 2
        by_seeds, by_samples = student.ppf(tail, self.freedom_of_seeds), student.ppf(tail, self.freedom_of_samples)
        return float(np.sqrt(by_seeds**2 * self.seeds + by_samples**2 * self.samples))

    def p_value(self, mean: float) -> float:
        """One minus the confidence of the interval around a mean that ends at 0."""
        if self.reach(1 - LEAST_P) <= abs(mean):
            return LEAST_P
        return float(1 - brentq(lambda confidence: self.reach(confidence) - abs(mean), 0.0, 1 - LEAST_P))


def spread_over_seeds(replicates: Sequence[Replicates], clusters: int) -> Spread | None:
    """The spread of the mean over S >= 2 seeds; None where it is zero or undefined.

    Seeds and samples are crossed random effects. The variance of the estimates over S is the part of seeds. The bootstrap of the
    mean gives the variance over samples, of which the part is left that is not in the former: seeds that err on different samples
    differ in their estimates, too, as the bootstrap of the differences between seeds shows.
    """
    estimates = np.array([own.estimate for own in replicates])
    resampled = np.stack([own.resampled for own in replicates])
    resampled = resampled[:, ~np.isnan(resampled).any(axis=0)]
    seeds = len(estimates)
    if np.isnan(estimates).any() or resampled.shape[1] < 2 or clusters < 2:
        return None
    over_samples = float(resampled.mean(axis=0).var(ddof=1))
    deviations = resampled - resampled.mean(axis=0)
    of_both = float(deviations.var(axis=1, ddof=1).sum() / (seeds - 1))
    between = float(estimates.var(ddof=1))
    found = Spread(between / seeds, max(0.0, over_samples - of_both / seeds), seeds - 1, clusters - 1)
    return found if found.seeds + found.samples > 1e-18 else None


def number_of_clusters(of: Predicted, clusters: np.ndarray | None) -> int:
    return len(of.labels) if clusters is None else len(np.unique(clusters))


def _bounded(metric: str, low: float, high: float) -> tuple[float, float]:
    """Cut an interval at the ends of a metric's range."""
    least = -1.0 if metric in ("mcc", "quadratic_kappa") else 0.0
    return max(low, least), high if metric == "mae" else min(high, 1.0)


def _bootstrapped(
    names: Sequence[str], of: Predicted, clusters: np.ndarray | None, seed: int
) -> dict[str, Interval | None]:
    noise, suffix = [noise_of(name) for name in names if name in NOISE], over_patients(clusters)
    replicates = {name: own[0] for name, own in replicate([*names, *noise], [of], clusters, seed).items()}
    found: dict[str, Interval | None] = {}
    for name in names:
        deviation = name in NOISE
        own = replicates[name]
        ends = own.interval_of_deviation(replicates[noise_of(name)].resampled) if deviation else own.interval()
        method = (DEVIATION if deviation else BCA) + suffix
        found[name] = Interval(*_bounded(name, *ends), method) if ends else None
    return found


def wilson(right: np.ndarray, clusters: np.ndarray | None) -> Interval | None:
    """Wilson's interval (1927) of a share; with clusters, of the effective number of samples (Korn and Graubard 1998)."""
    if not len(right):
        return None
    samples, share, method = float(len(right)), float(right.mean()), WILSON
    if not independent(clusters):
        assert clusters is not None
        samples, method = effective_samples(right, clusters), f"{WILSON} of effective n{over_patients(clusters)}"
    low, high = proportion_confint(share * samples, samples, 1 - CONFIDENCE, method="wilson")
    return Interval(float(low), float(high), method)


def effective_samples(values: np.ndarray, clusters: np.ndarray) -> float:
    """The number of independent samples whose mean varies as that of clustered ones, at most N.

    N over the design effect, with Student's t of M - 1 degrees of freedom in the place of the normal. Values that are all the
    same do not show how they depend on each other; they count as one per cluster (Kish 1965, with a correlation of 1).
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    sizes, number = np.bincount(codes).astype(float), int(codes.max()) + 1
    values = values.astype(np.float64)
    if np.ptp(values) == 0 or number < 2:
        return float(sizes.sum() ** 2 / np.square(sizes).sum())
    centred = values - values.mean()
    clustered = np.square(np.bincount(codes, centred)).sum() * number / (number - 1)
    effect = clustered / np.square(centred).sum()
    correction = (student.ppf((1 + CONFIDENCE) / 2, number - 1) / ndtri((1 + CONFIDENCE) / 2)) ** 2
    return float(len(values) / max(1.0, effect * correction))


def _rates(name: str, of: Predicted, clusters: np.ndarray | None) -> dict[str, Interval | None]:
    """Sensitivity or specificity of each class."""
    found = {}
    for label, of_class in enumerate(of.classes):
        positive, called = of.labels == label, of.predicted == label
        chosen, right = (positive, called) if name == "sensitivity" else (~positive, ~called)
        found[of_class] = wilson(right[chosen], None if clusters is None else clusters[chosen])
    return found


def _delong(of: Predicted, clusters: np.ndarray | None) -> Interval | None:
    """DeLong's interval of a binary AUROC, on the scale of logits, whose ends stay within 0 and 1 (Pepe 2003, 5.2.4)."""
    positive = of.labels == 1
    if positive.all() or not positive.any():
        return None
    (area,), ((variance,),) = delong([of.log_odds[:, 1]], positive, clusters)
    if not (variance > 0 and 0 < area < 1):
        return None
    reach = ndtri((1 + CONFIDENCE) / 2) * np.sqrt(variance) / (area * (1 - area))
    low, high = expit(logit(area) + np.array([-reach, reach]))
    return Interval(float(low), float(high), DELONG + over_patients(clusters))
