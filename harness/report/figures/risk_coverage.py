"""Risk against coverage: the share of errors when only the most confident predictions are answered."""

import numpy as np

from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.evaluation.statistics.selective import risk_coverage as curve_of
from vipbench.harness.report.figures.data import damage_note, groups, interval_note, sample_note
from vipbench.harness.report.figures.panels import legends_of_panels, make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import looks_by_label

PANELS = ("dataset", "backbone", "shots")
GRID = np.linspace(0.02, 1, 99)  # coverages


@figure("risk_coverage", "rows", "columns")
def risk_coverage(query: Query) -> Chart:
    """Draw a panel per dataset, backbone and shots; a curve is the mean over runs."""
    names = query.panels(PANELS)
    found = groups(query, names)
    drawn, axes = make_panels(names, found, 2.6)
    intervals: list[Interval | None] = []
    styles = looks_by_label(group.label for group in found)
    for column, ax in axes.items():
        for group in [group for group in found if group.column == column]:
            style = styles[group.label]
            curves = [curve_of(tested.of) for tested in group.tested]
            risk = np.mean([np.interp(GRID, curve.coverage, curve.risk) for curve in curves], axis=0)
            area = np.mean([curve.aurc for curve in curves])
            interval = group.interval_of("aurc")
            intervals.append(interval)
            ends = f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else ""
            label = f"{group.label}: AURC {area:.3f}{ends}"
            ax.plot(100 * GRID, 100 * risk, color=style.color, linestyle=style.dashes, label=label)
        ax.set_xlim(0, 100)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("coverage (% of images answered)")
        ax.set_ylabel("errors among them (%)")
    legends_of_panels(drawn, list(axes.values()))
    note = f"{place_note(names, found)}{sample_note(found)}. Images in the order of confidence; AURC: area under the curve, "
    note += f"the mean over runs; lower is better; {interval_note(intervals, '[low, high]')}"
    return Chart(drawn, f"{note}{damage_note(query)}")
