"""The bootstrap over clusters (patients), vectorised: intervals and the p-values that go with them.

Clusters are drawn with replacement, whole; all metrics and all runs of the same samples see the same resamples, so differences
are paired. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 14.3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.weighted import Clustered, Resampled, weighted_metric

RESAMPLES = 1000
JACKKNIFE_GROUPS = 200  # of clusters, at most; the acceleration of more is within 0.01
CELLS = 1 << 17  # of counts at a time; they and what is computed from them stay in the cache
FEWEST = 64  # resamples at a time
LEAST_DEFINED = 0.5  # of resamples, for an interval


def cluster_codes(names: Sequence[str | None] | np.ndarray | None) -> np.ndarray | None:
    """Clusters [N] int from names; a sample without a name is a cluster of its own. None where no sample has one."""
    if names is None or all(name is None for name in names):
        return None
    codes: dict[object, int] = {}
    return np.array(
        [codes.setdefault((place if name is None else 0, name), len(codes)) for place, name in enumerate(names)]
    )


def independent(clusters: np.ndarray | None) -> bool:
    """Check that no cluster has two samples."""
    return clusters is None or len(np.unique(clusters)) == len(clusters)


def over_patients(clusters: np.ndarray | None) -> str:
    """The end of a method's name: " over patients" where a cluster has two samples, else nothing."""
    return "" if independent(clusters) else " over patients"


@dataclass(frozen=True)
class Replicates:
    """A statistic, its values without each group of clusters [J] (jackknife), and of resamples [R]; NaN where undefined."""

    estimate: float
    jackknife: np.ndarray
    resampled: np.ndarray

    def __sub__(self, other: "Replicates") -> "Replicates":
        return Replicates(
            self.estimate - other.estimate, self.jackknife - other.jackknife, self.resampled - other.resampled
        )

    @property
    def defined(self) -> np.ndarray:
        """The resamples' values that are no NaN."""
        return self.resampled[~np.isnan(self.resampled)]

    @property
    def usable(self) -> bool:
        """Return True where most resamples are defined and not all the same, without which there is no interval."""
        values = self.defined
        return bool(len(values) > LEAST_DEFINED * len(self.resampled) and np.ptp(values) > 1e-12 * (1 + abs(values[0])))

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The BCa interval; None where too few resamples are defined, or all are the same."""
        if not self.usable:
            return None
        bias, acceleration = self._corrections()
        shifted = bias + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
        low, high = np.quantile(self.defined, ndtr(bias + shifted / (1 - acceleration * shifted)))
        return float(low), float(high)

    def interval_of_deviation(self, noise: np.ndarray, confidence: float = 0.95) -> tuple[float, float] | None:
        """The interval of a sum of absolute deviations, or of a range, which noise makes larger; BCa collapses on these.

        It reaches from the lower end of the normal interval around the estimate less its bootstrap bias to the upper end of that
        around the estimate itself; and from 0 where no true deviation would often give as much.

        Args:
            noise: values [R] of resamples where there is no true deviation.
        """
        if not self.usable:
            return None
        values = self.defined
        reach = float(ndtri((1 + confidence) / 2) * values.std(ddof=1))
        low = self.estimate - max(0.0, float(values.mean()) - self.estimate) - reach
        if self.estimate <= np.nanquantile(noise, (1 + confidence) / 2):
            low = 0.0
        return max(0.0, low), self.estimate + reach

    def p_value(self) -> float | None:
        """The two-sided p-value that a true value of 0 has: one minus the confidence of the BCa interval that ends there."""
        if not self.usable:
            return None
        bias, acceleration = self._corrections()
        shifted = ndtri(_share_below(self.defined, 0.0)) - bias
        position = float(ndtr(shifted / (1 + acceleration * shifted) - bias))
        return min(1.0, 2 * min(position, 1 - position))

    def _corrections(self) -> tuple[float, float]:
        """The bias correction z0 and the acceleration a."""
        bias = float(ndtri(_share_below(self.defined, self.estimate)))
        left = self.jackknife[~np.isnan(self.jackknife)]
        influence = left.mean() - left if len(left) else np.zeros(1)
        spread = np.square(influence).sum() ** 1.5
        return bias, float((influence**3).sum() / (6 * spread)) if spread else 0.0


def _share_below(values: np.ndarray, limit: float) -> float:
    """The share of values below a limit, ties counted half; never 0 or 1."""
    close = np.isclose(values, limit, rtol=1e-6, atol=1e-9)  # sums are float32
    share = (np.sum((values < limit) & ~close) + 0.5 * np.sum(close)) / len(values)
    return float(np.clip(share, 0.5 / (len(values) + 1), 1 - 0.5 / (len(values) + 1)))


def replicate(
    names: Sequence[str],
    several: Sequence[Predicted],
    clusters: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, list[Replicates]]:
    """Replicates of metrics for each of several predictions of the same samples, on the same resamples.

    Args:
        names: of metrics with a weighted form; "sensitivity[CLASS]" is one.
        clusters: [N] int; None: each sample is one.
    """
    everything = np.ones(len(several[0].labels), bool)
    return replicate_parts(names, [(of, everything) for of in several], clusters, seed, resamples)


def replicate_parts(
    names: Sequence[str],
    parts: Sequence[tuple[Predicted, np.ndarray]],
    clusters: np.ndarray | None,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, list[Replicates]]:
    """Replicates of metrics for each of several parts of the same N samples: predictions of the part, and its mask [N] bool."""
    codes = np.arange(len(parts[0][1])) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    number = int(codes.max()) + 1
    clustered = [Clustered(of, codes[mask], number) for of, mask in parts]
    values: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in parts] for name in names}
    for counts in _counts(number, seed, resamples):
        for place, own in enumerate(clustered):
            resampled = Resampled(own, counts)
            for name in names:
                weighted = weighted_metric(name, own.of)
                assert weighted is not None, f"{name} has no weighted form"
                with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have no sample of a part
                    values[name][place].append(weighted(resampled))
    return {name: [_split(np.concatenate(parts), resamples) for parts in own] for name, own in values.items()}


def _split(values: np.ndarray, resamples: int) -> Replicates:
    return Replicates(float(values[0]), values[1:-resamples], values[-resamples:])


def _counts(clusters: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Counts [M, b] float32 of M clusters: all once, all but each group of the jackknife, then resamples."""
    rng = np.random.default_rng(seed)
    groups = min(clusters, JACKKNIFE_GROUPS)
    group = rng.permutation(clusters) % groups
    size = max(FEWEST, CELLS // clusters)
    for first in range(-1, groups, size):
        left_out = np.arange(first, min(first + size, groups))
        yield (group[:, None] != left_out).astype(np.float32)
    for first in range(0, resamples, size):
        drawn = rng.integers(clusters, size=(min(size, resamples - first), clusters))
        drawn += clusters * np.arange(len(drawn))[:, None]  # a resample's own range of codes
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield np.ascontiguousarray(counts.T, np.float32)
