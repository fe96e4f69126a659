"""Bars of a symptom set and its controls, each with the difference of the set from it."""

from collections.abc import Sequence

from vipbench.harness.report.controls import PLACES, Result, differences
from vipbench.harness.report.figures.bars import bar_chart
from vipbench.harness.report.figures.registry import Chart, Query


def draw_controls(query: Query, results: Sequence[Result]) -> Chart:
    """Draw the lines that have runs, in the order of the table."""
    drawn = [result for result in results if result.line.group.runs]
    chart = bar_chart(query, list(PLACES), [result.line.group for result in drawn], differences(drawn, query.metric))
    note = " Signed numbers: the set minus it, with Holm-adjusted p-values of the paired comparison."
    return Chart(chart.figure, chart.note + note)
