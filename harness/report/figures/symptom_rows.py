"""Rows of symptoms below the names of their classes, as attention, diagnosis cards and the failure gallery share them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from vipbench.harness.report.figures.style import shortened_text
from vipbench.harness.runs.symptom_evidence import Symptoms

ROW = 0.155  # inches
LETTERS = 58  # of a symptom


def row_places(symptoms: Symptoms, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of some classes from the top: the symptoms shown [n], their rows [n], and the rows of the classes' names."""
    shown: list[int] = []
    rows: list[int] = []
    headers, row = [], 0
    for label in classes:
        own = np.flatnonzero(symptoms.owners == label)
        headers.append(row)
        shown += own.tolist()
        rows += range(row + 1, row + 1 + len(own))
        row += len(own) + 1
    return np.array(shown, int), np.array(rows, int), np.array(headers, int)


def draw_rows(
    ax: Axes,
    symptoms: Symptoms,
    headers: dict[int, str],
    values: np.ndarray,
    colors: dict[int, str],
    ends: np.ndarray | None = None,
    letters: int = LETTERS,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw bars of values [P], the symptoms of each class below its header.

    Args:
        headers, colors: by class.
        ends: [P], behind which the numbers stand; None: behind the bars.
        limits: the least and the greatest value of the axis; None: of those shown.
    """
    shown, rows, places = row_places(symptoms, list(headers))
    ax.barh(rows, values[shown], height=0.72, color=[colors[int(label)] for label in symptoms.owners[shown]])
    ax.axvline(0, color="black", linewidth=0.6)
    for row, value, end in zip(rows, values[shown], (values if ends is None else ends)[shown], strict=True):
        ax.text(max(end, 0.0), row, f" {value:.3f}".replace("-", "−"), va="center", fontsize=6.5)
    labels = {int(row): shortened_text(symptoms.texts[place], letters) for place, row in zip(shown, rows, strict=True)}
    labels |= dict(zip(places.tolist(), headers.values(), strict=True))
    ticks = sorted(labels)
    ax.set_yticks(ticks, [labels[row] for row in ticks], fontsize=6.5)
    of_row = dict(zip(places.tolist(), headers, strict=True))
    for tick, row in zip(ax.get_yticklabels(), ticks, strict=True):
        if row in of_row:
            tick.set_fontweight("bold")
            tick.set_color(colors[of_row[row]])
    low, high = limits or (float(values[shown].min()), float((values if ends is None else ends)[shown].max()))
    ax.set_xlim(min(0.0, low) * 1.1, max(high, 1e-6) * 1.2)
    ax.set_ylim(max(ticks) + 0.6, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", visible=False)
