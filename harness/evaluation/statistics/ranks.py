"""Average ranks of methods over datasets, Friedman's test and Nemenyi's critical difference (Demsar, JMLR 2006)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

LEVEL = 0.05


@dataclass(frozen=True)
class Ranks:
    """Ranks of K methods over D datasets.

    Attributes:
        names: of the methods, the best average rank first. average: [K], 1 is best. datasets: D.
        friedman_p: of no difference between methods; None where there are under 3 methods or 2 datasets, or all is tied.
        critical_difference: between two average ranks, at the level 0.05.
        groups: maximal runs of methods, as positions (first, last), whose ranks differ by no more than that.
    """

    names: list[str]
    average: np.ndarray
    datasets: int
    friedman_p: float | None
    critical_difference: float
    groups: list[tuple[int, int]]

    @property
    def p(self) -> np.ndarray:
        """P-values [K, K] of Nemenyi's test of each pair."""
        distances = np.abs(self.average[:, None] - self.average) / _error(len(self.average), self.datasets)
        return np.asarray(studentized_range.sf(distances * np.sqrt(2), len(self.average), np.inf))


def average_ranks(scores: np.ndarray, names: Sequence[str], lower_is_better: bool = False) -> Ranks:
    """Rank methods within each dataset (ties share their mean rank) and average over datasets.

    Args:
        scores: [D, K], D >= 1 datasets and K >= 2 methods, without gaps: leave a dataset out, and say so, that lacks a method.
    """
    datasets, methods = scores.shape
    assert datasets >= 1 and methods == len(names) >= 2 and np.isfinite(scores).all()
    ranks = rankdata(scores if lower_is_better else -scores, axis=1)
    order = np.argsort(ranks.mean(axis=0), kind="stable")
    ranks = ranks[:, order]
    average = ranks.mean(axis=0)
    difference = _quantile(methods) * _error(methods, datasets)
    friedman = None
    if methods >= 3 and datasets >= 2 and (np.ptp(ranks, axis=1) > 0).any():
        friedman = float(friedmanchisquare(*ranks.T).pvalue)
    return Ranks(
        [names[place] for place in order],
        average,
        datasets,
        friedman,
        difference,
        _groups(average, difference),
    )


@cache
def _quantile(methods: int) -> float:
    """The quantile of the studentised range over the square root of 2, for K methods."""
    return float(studentized_range.ppf(1 - LEVEL, methods, np.inf) / np.sqrt(2))


def _error(methods: int, datasets: int) -> float:
    """The standard error of a difference of average ranks."""
    return float(np.sqrt(methods * (methods + 1) / (6 * datasets)))


def _groups(average: np.ndarray, difference: float) -> list[tuple[int, int]]:
    """Maximal runs of sorted ranks no wider than the critical difference, of two methods or more."""
    groups: list[tuple[int, int]] = []
    for first, rank in enumerate(average):
        last = int(np.searchsorted(average, rank + difference, side="right")) - 1
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups
