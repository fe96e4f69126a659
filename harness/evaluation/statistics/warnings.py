"""Warnings where evidence is thin, as sentences for whoever reads a table, a figure or a page."""

from collections.abc import Mapping, Sequence

from vipbench.harness.evaluation.statistics.intervals import Interval

LEAST_SAMPLES = 50  # of a class in the test split
LEAST_CLUSTERS = 30  # for intervals over patients


def few_samples(counts: Mapping[str, int]) -> list[str]:
    """A warning for the classes with fewer than 50 test samples.

    Args:
        counts: test samples by class.
    """
    few = [f"{name} ({count})" for name, count in counts.items() if count < LEAST_SAMPLES]
    return [f"fewer than {LEAST_SAMPLES} test samples of {', '.join(few)}"] if few else []


def few_clusters(clusters: int | None) -> list[str]:
    """A warning for a test split of fewer than 30 patients; None: patients are unknown."""
    if clusters is None:
        return ["patients are unknown: intervals and tests take all samples for independent"]
    return [f"{clusters} patients only: intervals over patients are too narrow"] if clusters < LEAST_CLUSTERS else []


def one_seed(seeds: int) -> list[str]:
    """A warning for results of one seed."""
    return ["one seed only: how much the result varies with the seed is unknown"] if seeds == 1 else []


def overlapping(best: str, intervals: Mapping[str, Interval | None]) -> list[str]:
    """A warning for the methods whose interval overlaps with that of the best, or that have none.

    Args:
        intervals: of one metric by method.
    """
    own = intervals[best]
    others: Sequence[str] = [
        name
        for name, other in intervals.items()
        if name != best and (own is None or other is None or own.overlaps(other))
    ]
    return [f"the interval of {best} overlaps with {', '.join(others)}: compare them in pairs"] if others else []
