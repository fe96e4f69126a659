"""Confusion matrix: test images by class and prediction, in per cent of the class."""

import numpy as np
from matplotlib.figure import Figure

from vipbench.harness.report.figures.data import damage_note, one_group, sample_note
from vipbench.harness.report.figures.panels import place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import COLUMN, PAGE, shortened_text

NUMBERED = 20  # classes, at most, whose cells have numbers


@figure("confusion")
def confusion(query: Query) -> Chart:
    """Draw the matrix of one method, the sum over its runs."""
    group = one_group(query, "confusion")
    tested = group.tested
    counts = np.sum([own.of.confusion for own in tested], axis=0)
    classes, rows = tested[0].of.classes, counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, rows, out=np.full(counts.shape, np.nan), where=rows > 0)
    side = min(PAGE, max(COLUMN, 1.5 + 0.55 * len(classes)))
    drawn = Figure(figsize=(side, side * 0.9))
    ax = drawn.add_subplot()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= NUMBERED:
        for (label, predicted), count in np.ndenumerate(counts):
            share = shares[label, predicted]
            color = "white" if share > 55 else "black"
            text = f"{share:.0f}%\n{count}" if rows[label, 0] else "–"
            ax.text(
                predicted, label, text, ha="center", va="center", color=color, fontsize=6.5, gid=f"{label}-{predicted}"
            )
    names = [shortened_text(name, 24) for name in classes]
    ax.set_xticks(range(len(classes)), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("class")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{group.label}: accuracy {100 * group.mean('accuracy'):.1f}%")
    if len(classes) > NUMBERED:
        drawn.colorbar(image, ax=ax, label="% of the class", shrink=0.8)
    place = place_note(("dataset", "backbone", "shots"), [group])
    return Chart(drawn, f"{place}{sample_note([group])}; counts are sums over runs.{damage_note(query)}")
