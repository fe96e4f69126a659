"""Attention of the merge prompt: the weight of each symptom in its class's feature, by class."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import damage_note, one_group
from vipbench.harness.report.figures.panels import place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import GREY, PAGE, class_color
from vipbench.harness.report.figures.symptom_rows import ROW, draw_rows, row_places
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.symptom_evidence import Explainer

MOST_ROWS = 90


@figure("attention")
def attention(query: Query) -> Chart:
    """Draw bars of mean weights over runs, a dot for each run, and a line at equal weights."""
    group = one_group(query, "attention")
    runs = [Run(Path(own["run"])) for own in group.runs]
    read = [Explainer(run).symptoms for run in runs]
    first = read[0]
    if first is None or first.weights is None:
        raise UserError(f"attention: {group.label} has no merge prompt that weighs symptoms; vip has one")
    weights = np.array([own.weights for own in read if own is not None])
    classes, left_out = list(range(len(runs[0].classes))), 0
    while len(classes) > 1 and len(row_places(first, classes)[1]) + len(classes) > MOST_ROWS:
        classes.pop()
        left_out += 1
    shown, rows, _ = row_places(first, classes)
    drawn = Figure(figsize=(PAGE, 0.7 + ROW * (len(shown) + len(classes))))
    ax = drawn.add_subplot()
    headers = {label: runs[0].classes[label] for label in classes}
    colors = {label: class_color(label) for label in classes}
    draw_rows(ax, first, headers, weights.mean(axis=0), colors, weights.max(axis=0))
    for own in weights if len(weights) > 1 else ():
        ax.plot(
            own[shown],
            rows,
            marker="o",
            markersize=2.5,
            color=GREY,
            markeredgecolor="white",
            markeredgewidth=0.3,
            linestyle="",
        )
    for label in classes:
        mine = rows[first.owners[shown] == label]
        ax.plot([1 / len(mine)] * 2, [mine.min() - 0.45, mine.max() + 0.45], color=GREY, linewidth=0.9, linestyle=":")
    ax.set_xlabel("weight of the symptom in its class (a class sums to 1)")
    note = f"{place_note(('dataset', 'backbone', 'shots'), [group])}{group.label}, n = {len(runs)} runs (seeds), {len(shown)} "
    note += "symptoms. Bars and numbers: mean over runs; dots: runs; dotted: equal weights."
    note += f" {left_out} classes are not shown." if left_out else ""
    return Chart(drawn, note + damage_note(query))
