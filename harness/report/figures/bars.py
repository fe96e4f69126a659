"""Bars of a metric with 95% intervals: one per method, and the variants of one method as an ablation."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.statistics.comparisons import compare_over_seeds, holm
from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.report.figures.data import (
    Group,
    damage_note,
    groups,
    interval_note,
    metric_label,
    p_words,
    percent,
    same_samples,
    sample_note,
    signed,
    written,
)
from vipbench.harness.report.figures.panels import make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import BLACK, look, shortened_text
from vipbench.harness.report.tables.evidence import statistic
from vipbench.harness.report.tables.values import COSTS, PLAIN

PANELS = ("dataset", "backbone", "shots")
BAR = 0.24  # inches


@figure("bars", "metric", "rows", "columns")
def bars(query: Query) -> Chart:
    """Draw a panel per dataset, backbone and shots, the values written at the bars."""
    names = query.panels(PANELS)
    found = groups(query, names)
    return bar_chart(query, names, found, {})


@figure("ablation", "metric", "columns")
def ablation(query: Query) -> Chart:
    """Draw the variants of one method, each with its difference from the first one and the p-value of that."""
    names = query.panels(PANELS)
    methods = list(dict.fromkeys(str(name) for name in query.runs["method.name"]))
    if len(methods) > 1:
        raise UserError(
            f"ablation shows the variants of one method; narrow it down: method={' or method='.join(methods)}"
        )
    found = groups(query, names)
    if len({group.label for group in found}) < 2:
        raise UserError(f"ablation: the runs of {methods[0]} do not differ in any option of the method")
    texts: dict[int, str] = {}
    for column in dict.fromkeys(group.column for group in found):
        own = [group for group in found if group.column == column]
        compared = [_difference(query.metric, group, own[0]) for group in own[1:]]
        adjusted = holm([p for _, p in compared])
        for group, (difference, _), p in zip(own[1:], compared, adjusted, strict=True):
            shown_p = "" if p is None else f" ({p_words(p, equals=True)})"
            texts[id(group)] = f"{signed(query.metric, difference)}{shown_p}"
    chart = bar_chart(query, names, found, texts)
    note = " Signed numbers: difference from the first variant, with Holm-adjusted p-values of the paired comparison."
    return Chart(chart.figure, chart.note + note)


def _difference(metric: str, own: Group, first: Group) -> tuple[float, float | None]:
    """The difference of two groups and its p-value; None where they share neither samples nor seeds."""
    pair = [
        {run["seed"]: tested for run, tested in zip(group.runs, group.tested, strict=True)} for group in (own, first)
    ]
    seeds = [seed for seed in pair[0] if seed in pair[1]]
    tested = [[of_group[seed] for seed in seeds] for of_group in pair]
    difference = own.mean(metric) - first.mean(metric)
    if metric in COSTS or not seeds or not same_samples([*tested[0], *tested[1]]):
        return difference, None
    mine, others = ([one.of for one in of_group] for of_group in tested)
    found = compare_over_seeds(statistic(metric), mine, others, tested[0][0].stored.clusters)
    return difference, found.p if found else None


def bar_chart(query: Query, names: Sequence[str], found: Sequence[Group], texts: dict[int, str]) -> Chart:
    """Draw groups as bars, a panel for each value of their columns.

    Args:
        names: of the columns' values. texts: written behind the value of a bar, by the id of its group.
    """
    intervals = {id(group): group.interval(query.metric) for group in found}
    most = max(sum(group.column == other.column for other in found) for group in found)
    drawn, axes = make_panels(names, found, 0.75 + BAR * most, wide=bool(texts))
    for column, ax in axes.items():
        own = [group for group in found if group.column == column]
        _bars(ax, own, query.metric, intervals, texts)
        ax.set_ylim(most - 0.5, -0.5)  # bars as thick in every panel
    note = f"{place_note(names, found)}{sample_note(found)}. "
    return Chart(drawn, note + interval_note(list(intervals.values()), "Whiskers") + damage_note(query))


def _bars(
    ax: Axes, own: Sequence[Group], metric: str, intervals: dict[int, Interval | None], texts: dict[int, str]
) -> None:
    places = range(len(own))
    values = [percent(metric, group.mean(metric)) for group in own]
    ax.barh(places, values, height=0.7, color=[look(group.label).color for group in own])
    top = max([value for value in values if not math.isnan(value)], default=0.0)
    for place, group, value in zip(places, own, values, strict=True):
        end = intervals[id(group)]
        right = value
        if end:
            low, right = percent(metric, end.low), percent(metric, end.high)
            for color, width in (("white", 2.2), (BLACK, 1.0)):  # seen on bars of any colour
                ax.plot([low, right], [place, place], color=color, linewidth=width, solid_capstyle="butt")
            top = max(top, right)
        text = "undefined" if math.isnan(value) else written(metric, group.mean(metric))
        beside = f"  {text}" + (f"   {texts[id(group)]}" if id(group) in texts else "")
        ax.text(0 if math.isnan(right) else right, place, beside, va="center", fontsize=7)
    ax.set_yticks(places, [shortened_text(group.label, 42) for group in own])
    limits = (min(0, *values), top * (1.45 if texts else 1.2) or 1)
    ax.set_xlim(limits)
    if metric not in PLAIN:
        ax.set_xticks([tick for tick in ax.get_xticks() if limits[0] <= tick <= min(100, limits[1])])
    ax.set_xlabel(metric_label(metric))
    ax.grid(axis="y", visible=False)
