"""Training curves: loss, and accuracy on validation images where epochs were validated, by epoch."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import Group, damage_note, groups, runs_note
from vipbench.harness.report.figures.panels import legend_below, place_note, title_part, varying
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import COLUMN, PAGE, Look, looks
from vipbench.harness.runs.directory import MOST_LOG_BYTES, STEPS, read_provenance
from vipbench.harness.system.files import parse_json, read_whole

PLACE = ("dataset", "backbone", "shots")
QUANTITIES = {"loss": "training loss", "validation_accuracy": "validation accuracy (%)"}


@figure("training", "rows")
def training(query: Query) -> Chart:
    """Draw thin lines of runs and a thick one for their mean; the kept epoch is marked on each run's line."""
    trained = [Path(run, STEPS).is_file() for run in query.runs["run"]]
    if not any(trained):
        raise UserError(f"training: no run here has a log of steps ({STEPS}); its methods have no training loop")
    found = groups(Query(query.runs[trained].reset_index(drop=True), rows=query.rows), PLACE)
    curves = {id(group): [read_curve(Path(run["run"])) for run in group.runs] for group in found}
    shown_quantities = [name for name in QUANTITIES if any(name in curve for own in curves.values() for curve in own)]
    differing = varying([group.column for group in found])
    labels = [
        " / ".join([group.label, *(title_part(PLACE[place], group.column[place]) for place in differing)])
        for group in found
    ]
    drawn = Figure(figsize=(PAGE if len(shown_quantities) > 1 else COLUMN, 2.7))
    axes = [drawn.add_subplot(1, len(shown_quantities), place + 1) for place in range(len(shown_quantities))]
    for ax, name in zip(axes, shown_quantities, strict=True):
        for group, label, style in zip(found, labels, looks(labels), strict=True):
            _lines(ax, name, label, style, group, curves[id(group)])
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel(QUANTITIES[name])
        if name == "loss":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
    legend_below(drawn, axes)
    note = f"{place_note(PLACE, found)}n = {runs_note(found)} each. "
    note += "Thin: a run; thick: their mean; dot: the epoch that was kept."
    return Chart(drawn, note + damage_note(query))


def read_curve(run: Path) -> pd.DataFrame:
    """The log of steps by epoch: the mean loss, and what was validated. Raises UserError where it is damaged."""
    path = run / STEPS
    try:
        rows = pd.DataFrame([parse_json(line) for line in read_whole(path, MOST_LOG_BYTES).splitlines()])
        return rows[[name for name in ("epoch", *QUANTITIES) if name in rows]].groupby("epoch").mean()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error


def _lines(ax: Axes, name: str, label: str, style: Look, group: Group, curves: list[pd.DataFrame]) -> None:
    factor = 100 if name == "validation_accuracy" else 1
    own = [factor * curve[name].dropna() for curve in curves if name in curve]
    if not own:
        return
    for run, values in zip(group.runs, own, strict=False):
        if len(own) > 1:
            ax.plot(values.index, values, color=style.color, linewidth=0.5, alpha=0.5)
        kept = read_provenance(Path(run["run"])).get("kept_epoch")
        at = values[values.index == kept]
        ax.plot(at.index, at, marker="o", markersize=3, color=style.color, linestyle="")
    mean = pd.concat(own, axis=1).mean(axis=1)
    ax.plot(mean.index, np.asarray(mean), color=style.color, linestyle=style.dashes, label=label)
