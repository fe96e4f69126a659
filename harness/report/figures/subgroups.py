"""Subgroup dots: a metric with 95% intervals by the values of a column of the predictions, such as the scanner."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER, METRICS
from vipbench.harness.evaluation.statistics.intervals import Interval, interval_over_seeds
from vipbench.harness.evaluation.statistics.subgroups import UNKNOWN
from vipbench.harness.report.figures.data import (
    Group,
    damage_note,
    groups,
    interval_note,
    metric_label,
    percent,
    same_samples,
    sample_note,
    written,
)
from vipbench.harness.report.figures.panels import legend_below, make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import GREY, looks_by_label, shortened_text

PANELS = ("dataset", "backbone", "shots")


class Dot(NamedTuple):
    """A metric of the n test images with one value in a column, the mean over runs; NaN where it is undefined."""

    name: str
    samples: int
    value: float
    interval: Interval | None


@figure("subgroups", "metric", "rows", "columns", "by")
def subgroups(query: Query) -> Chart:
    """Draw a row per subgroup and a dot per method; the dotted line is the metric of all images."""
    names = query.panels(PANELS)
    found = groups(query, names)
    if query.metric not in METRICS:
        raise UserError(
            f"--metric: {query.metric!r} is not a metric of predictions; {did_you_mean(query.metric, METRICS)}"
        )
    dots = {id(group): by_column(group, query.metric, query.by) for group in found}
    most = max(len(own) for own in dots.values())
    methods = max(sum(group.column == other.column for other in found) for group in found)
    drawn, axes = make_panels(names, found, 0.9 + most * max(0.2, 0.13 * methods))
    gaps, styles = [], looks_by_label(group.label for group in found)
    for column, ax in axes.items():
        own = [group for group in found if group.column == column]
        rows = list(dict.fromkeys(dot.name for group in own for dot in dots[id(group)]))
        counts = {dot.name: dot.samples for group in own for dot in dots[id(group)]}
        for place, group in enumerate(own):
            style, offset = styles[group.label], 0.7 * ((place + 0.5) / len(own) - 0.5)
            ys = [rows.index(dot.name) + offset for dot in dots[id(group)]]
            _dots(ax, dots[id(group)], ys, query.metric, style.color, style.marker, group.label)
            ax.axvline(percent(query.metric, group.mean(query.metric)), color=style.color, linewidth=0.8, linestyle=":")
            gaps.append(_gap(group, dots[id(group)], query.metric))
        ax.set_yticks(range(len(rows)), [f"{shortened_text(name, 28)} (n = {counts[name]})" for name in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel(metric_label(query.metric))
        for edge in range(1, len(rows)):
            ax.axhline(edge - 0.5, color=GREY, linewidth=0.3)
        ax.grid(axis="y", visible=False)
    legend_below(drawn, list(axes.values()))
    intervals = [dot.interval for own in dots.values() for dot in own]
    note = f"{place_note(names, found)}{sample_note(found)}, by {query.by}. {interval_note(intervals, 'Whiskers')} Dotted: all "
    return Chart(drawn, f"{note}images. {' '.join(filter(None, gaps))}{damage_note(query)}")


def by_column(group: Group, metric: str, column: str) -> list[Dot]:
    """A metric by the values of a column, `UNKNOWN` last. Raises UserError where the predictions lack the column."""
    tested = group.tested
    known = set.intersection(*(set(own.columns) for own in tested))
    if column not in known:
        raise UserError(f"--by: the predictions have no column {column!r}; they have {', '.join(sorted(known))}")
    every = [np.array([UNKNOWN if value is None else value for value in own.columns[column]]) for own in tested]
    dots = []
    for name in sorted(set(every[0]), key=lambda name: (name == UNKNOWN, name)):
        masks = [values == name for values in every]
        parts = [own.of.select(mask) for own, mask in zip(tested, masks, strict=True)]
        found = [METRICS[metric](part) for part in parts]
        values = [float(value) for value in found if isinstance(value, int | float)]
        clusters = tested[0].stored.clusters
        interval = None
        if same_samples(tested) and len(values) == len(parts):
            interval = interval_over_seeds(metric, parts, None if clusters is None else clusters[masks[0]])
        dots.append(Dot(name, len(parts[0].labels), float(np.mean(values)) if values else math.nan, interval))
    return dots


def _dots(ax: Axes, dots: list[Dot], ys: list[float], metric: str, color: str, marker: str, label: str) -> None:
    for dot, y in zip(dots, ys, strict=True):
        if dot.interval:
            ends = [percent(metric, dot.interval.low), percent(metric, dot.interval.high)]
            ax.plot(ends, [y, y], color=color, linewidth=0.9)
    ax.plot([percent(metric, dot.value) for dot in dots], ys, color=color, marker=marker, linestyle="", label=label)


def _gap(group: Group, dots: list[Dot], metric: str) -> str:
    """A sentence with the worst subgroup and the gap to the best."""
    known = [dot for dot in dots if not math.isnan(dot.value)]
    if len(known) < 2:
        return ""
    order = sorted(known, key=lambda dot: dot.value, reverse=metric in LOWER_IS_BETTER)
    gap = written(metric, abs(order[0].value - order[-1].value))
    return f"{group.label}: worst {order[0].name}, {gap} from the best."
