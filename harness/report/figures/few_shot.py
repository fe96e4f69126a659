"""Few-shot curves: a metric against training images per class, a line per method, with 95% bands."""

from typing import Any

from matplotlib.axes import Axes

from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import (
    Group,
    damage_note,
    groups,
    interval_note,
    metric_label,
    percent,
    sample_note,
    shown,
)
from vipbench.harness.report.figures.panels import legend_below, make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import Look, looks_by_label
from vipbench.harness.report.tables.values import sort_key

PANELS = ("dataset", "backbone")


@figure("few_shot", "metric", "rows", "columns")
def few_shot(query: Query) -> Chart:
    """Draw a panel per dataset and backbone; methods without training images are level lines."""
    names = query.panels(PANELS)
    found = groups(query, [*names, "shots"])
    shots = sorted({group.column[-1] for group in found if group.column[-1] != 0}, key=sort_key)
    if not shots:
        raise UserError("few_shot: no run here has training images; draw bars of them instead")
    drawn, axes = make_panels(names, found, 2.6, width=len(names))
    styles = looks_by_label(group.label for group in found)
    intervals = {id(group): group.interval(query.metric) for group in found}
    for column, ax in axes.items():
        for label, style in styles.items():
            own = [group for group in found if group.label == label and group.column[:-1] == column]
            _line(ax, own, shots, query.metric, style, intervals)
        ax.set_xticks(range(len(shots)), [shown(value) for value in shots])
        ax.set_xlim(-0.3, len(shots) - 0.7)
        ax.set_xlabel("training images per class")
        ax.set_ylabel(metric_label(query.metric))
        ax.grid(axis="x", visible=False)
    legend_below(drawn, list(axes.values()))
    note = f"{place_note(names, found, len(names))}{sample_note(found)}. "
    return Chart(drawn, note + interval_note(list(intervals.values()), "Bands") + damage_note(query))


def _line(ax: Axes, own: list[Group], shots: list[Any], metric: str, style: Look, intervals: dict[int, Any]) -> None:
    level = [group for group in own if group.column[-1] == 0]
    curve = [group for group in own if group.column[-1] != 0]
    for group in level:
        value = percent(metric, group.mean(metric))
        ax.axhline(value, color=style.color, linestyle=style.dashes, linewidth=1.0, label=group.label)
    if not curve:
        return
    curve.sort(key=lambda group: sort_key(group.column[-1]))
    x = [shots.index(group.column[-1]) for group in curve]
    y = [percent(metric, group.mean(metric)) for group in curve]
    ax.plot(
        x, y, color=style.color, marker=style.marker, linestyle=style.dashes, label=curve[0].label, gid=curve[0].label
    )
    ends = [intervals[id(group)] for group in curve]
    if len(curve) > 1:
        low = [percent(metric, end.low if end else float("nan")) for end in ends]
        high = [percent(metric, end.high if end else float("nan")) for end in ends]
        ax.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)
    elif ends[0]:
        ax.errorbar(
            x, y, [[y[0] - percent(metric, ends[0].low)], [percent(metric, ends[0].high) - y[0]]], color=style.color
        )
