"""Cost against accuracy: a metric by seconds of training, on a logarithmic scale."""

import numpy as np

from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import (
    damage_note,
    groups,
    interval_note,
    metric_label,
    percent,
    sample_note,
)
from vipbench.harness.report.figures.panels import legend_below, make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import looks_by_label

PANELS = ("dataset", "backbone", "shots")
COST = "cost.train_seconds"


@figure("cost", "metric", "rows", "columns")
def cost(query: Query) -> Chart:
    """Draw a point per method; methods that train nothing stand at the left edge."""
    names = query.panels(PANELS)
    if f"metrics.{COST}" not in query.runs or query.runs[f"metrics.{COST}"].isna().all():
        raise UserError("cost: no run here has its training time on record; runs of earlier versions do not")
    found = [group for group in groups(query, names) if len(group.values(COST))]
    seconds = [group.mean(COST) for group in found]
    least = min([value for value in seconds if value > 0], default=1.0) / 3
    drawn, axes = make_panels(names, found, 2.8)
    intervals = [group.interval(query.metric) for group in found]
    styles = looks_by_label(group.label for group in found)
    for group, value, end in zip(found, seconds, intervals, strict=True):
        ax, style, y = axes[group.column], styles[group.label], percent(query.metric, group.mean(query.metric))
        x = max(value, least)
        if end:
            ax.plot(
                [x, x],
                [percent(query.metric, end.low), percent(query.metric, end.high)],
                color=style.color,
                linewidth=0.8,
            )
        ax.plot([x], [y], color=style.color, marker=style.marker, markersize=6, linestyle="", label=group.label)
    for ax in axes.values():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlim(least / 1.5, max(*seconds, least * 3) * 2)
        ax.set_xlabel("seconds of training")
        ax.set_ylabel(metric_label(query.metric))
    legend_below(drawn, list(axes.values()))
    note = f"{place_note(names, found)}{sample_note(found)}; seconds are means over runs"
    note += ", 0 at the left edge. " if np.min(seconds) <= 0 else ". "
    return Chart(drawn, note + interval_note(intervals, "Whiskers") + damage_note(query))
