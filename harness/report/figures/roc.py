"""ROC curves: of each class against the others for one method, or of several methods (the mean over classes)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from sklearn.metrics import roc_auc_score, roc_curve

from vipbench.harness.evaluation.metrics import Predicted, distinguishable
from vipbench.harness.report.figures.data import Group, damage_note, groups, interval_note, sample_note
from vipbench.harness.report.figures.panels import legends_of_panels, make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import GREY, class_color, looks_by_label, shortened_text

PANELS = ("dataset", "backbone", "shots")
GRID = np.linspace(0, 1, 201)  # false positive rates


@figure("roc", "rows", "columns")
def roc(query: Query) -> Chart:
    """Draw a panel per dataset, backbone and shots; curves are vertical means over classes and runs (Fawcett 2006, 6.1)."""
    names = query.panels(PANELS)
    found = groups(query, names)
    drawn, axes = make_panels(names, found, 3.0)
    intervals, styles = [], looks_by_label(group.label for group in found)
    for column, ax in axes.items():
        own = [group for group in found if group.column == column]
        ax.plot([0, 100], [0, 100], color=GREY, linewidth=0.6, linestyle=":")
        if len(found) == 1 and len(own[0].tested[0].of.classes) > 2:
            _by_class(ax, own[0])
        for group in own:
            style, end = styles[group.label], group.interval("auroc")
            intervals.append(end)
            interval = f" [{end.low:.3f}, {end.high:.3f}]" if end else ""
            curve = mean_curve([tested.of for tested in group.tested])
            label = f"{group.label}: AUROC {group.mean('auroc'):.3f}{interval}"
            _draw(ax, curve, label, color=style.color, linestyle=style.dashes, linewidth=2.0)
        ax.set_xlim(-1, 101)
        ax.set_ylim(-1, 101)
        ax.set_aspect("equal")
        ax.set_xlabel("1 − specificity (%)")
        ax.set_ylabel("sensitivity (%)")
    legends_of_panels(drawn, list(axes.values()))
    note = f"{place_note(names, found)}{sample_note(found)}. Mean over classes, one against the others, and runs. "
    return Chart(drawn, note + interval_note(intervals, "Brackets") + damage_note(query))


def mean_curve(several: Sequence[Predicted]) -> np.ndarray:
    """Sensitivity at each false positive rate of `GRID`, averaged over distinguishable classes and runs.

    Of two classes only the second one is drawn, since the first one's curve is its mirror image.
    """
    curves = [
        _curve(of, label)
        for of in several
        for label in (distinguishable(of) if len(of.classes) > 2 else distinguishable(of)[-1:])
    ]
    return np.mean(curves, axis=0) if curves else np.full(len(GRID), np.nan)


def _by_class(ax: Axes, group: Group) -> None:
    several = [tested.of for tested in group.tested]
    for label in range(len(several[0].classes)):
        told = [of for of in several if label in distinguishable(of)]
        if told:
            curve = np.mean([_curve(of, label) for of in told], axis=0)
            area = np.mean([roc_auc_score(of.labels == label, of.log_odds[:, label]) for of in told])
            name = f"{shortened_text(told[0].classes[label], 30)}: AUROC {area:.3f}"
            _draw(ax, curve, name, color=class_color(label), linewidth=1.0, zorder=3)


def _draw(ax: Axes, curve: np.ndarray, label: str, **style: Any) -> None:
    ax.plot([0, *(100 * GRID)], [0, *(100 * curve)], label=label, **style)


def _curve(of: Predicted, label: int) -> np.ndarray:
    false, true, _ = roc_curve(of.labels == label, of.log_odds[:, label])
    return np.interp(GRID, false, true)
