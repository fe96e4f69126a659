"""A metric by subgroup of a metadata column: every group with its interval, the worst one, and the gap between best and worst."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER, Predicted
from vipbench.harness.evaluation.statistics.bootstrap import Replicates, over_patients, replicate_parts
from vipbench.harness.evaluation.statistics.intervals import DEVIATION, Interval, interval
from vipbench.harness.evaluation.statistics.weighted import weighted_metric

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Subgroup:
    """A metric of the samples with one value in a column; None where it is undefined. They are of `clusters` patients."""

    name: str
    samples: int
    clusters: int
    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Subgroups:
    """All groups in the order of their names, `UNKNOWN` last.

    Attributes:
        worst: the group with the worst value. gap: between the best and the worst, with its interval; all None where fewer than
            two groups have a value.
    """

    metric: str
    groups: list[Subgroup]
    worst: Subgroup | None
    gap: float | None
    gap_interval: Interval | None


def subgroups(
    metric: str,
    of: Predicted,
    values: Sequence[str | None] | np.ndarray,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> Subgroups | None:
    """Split samples by a column and compare the groups; None where the metric has no weighted form.

    Args:
        values: [N], None where unknown.
    """
    if weighted_metric(metric, of) is None:
        return None
    named = np.array([UNKNOWN if value is None else str(value) for value in values], dtype=object)
    names = sorted(set(named), key=lambda name: (name == UNKNOWN, name))
    masks = [named == name for name in names]
    parts = [of.select(mask) for mask in masks]
    replicates = replicate_parts([metric], list(zip(parts, masks, strict=True)), clusters, seed)[metric]
    groups = []
    for name, mask, part, own in zip(names, masks, parts, replicates, strict=True):
        patients = None if clusters is None else clusters[mask]
        number = len(part.labels) if patients is None else len(np.unique(patients))
        value = None if np.isnan(own.estimate) else own.estimate
        groups.append(Subgroup(name, len(part.labels), number, value, interval(metric, part, patients, seed)))
    known = [group for group in groups if group.value is not None]
    if len(known) < 2:
        return Subgroups(metric, groups, None, None, None)
    worst = (max if metric in LOWER_IS_BETTER else min)(known, key=lambda group: group.value or 0.0)
    defined = [own for own in replicates if not np.isnan(own.estimate)]
    gap, noise = _gap(defined)
    ends = gap.interval_of_deviation(noise)
    found = Interval(*ends, DEVIATION + over_patients(clusters)) if ends else None
    return Subgroups(metric, groups, worst, gap.estimate, found)


def _gap(groups: Sequence[Replicates]) -> tuple[Replicates, np.ndarray]:
    """The greatest difference between groups, NaN where one is undefined, and [R] where groups differ by chance alone."""
    estimates = np.array([own.estimate for own in groups])
    jackknife, resampled = (np.stack([getattr(own, name) for own in groups]) for name in ("jackknife", "resampled"))
    gap = Replicates(float(np.ptp(estimates)), np.ptp(jackknife, axis=0), np.ptp(resampled, axis=0))
    return gap, np.ptp(resampled - estimates[:, None], axis=0)
