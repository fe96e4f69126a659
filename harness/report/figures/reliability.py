"""Reliability diagrams: accuracy against confidence in bins, and how many images each bin holds."""

from dataclasses import replace

import numpy as np

from vipbench.harness.evaluation.metrics import CALIBRATION_BINS, Predicted, calibration_bins
from vipbench.harness.report.figures.data import damage_note, groups, sample_note
from vipbench.harness.report.figures.panels import make_panels, place_note
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import GREY, LIGHT_GREY, look, shortened_text

NAMES = ("dataset", "backbone", "shots", "method")


@figure("reliability")
def reliability(query: Query) -> Chart:
    """Draw a panel per method, dataset, backbone and shots, of the top label's confidence (Guo et al., arXiv 1706.04599)."""
    found = groups(query, ["dataset", "backbone", "shots"])
    panels = [replace(group, column=(*group.column, group.label)) for group in found]
    drawn, axes = make_panels(NAMES, panels, 2.8)
    for group in panels:
        ax = axes[group.column]
        confidence, share, accuracy = bins([tested.of for tested in group.tested])
        width = 100 / CALIBRATION_BINS
        left = width * np.arange(CALIBRATION_BINS)
        ax.bar(left, 100 * share, width, align="edge", color=LIGHT_GREY, linewidth=0, label="share of images")
        ax.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=":")
        style = look(group.label)
        ax.plot(100 * confidence, 100 * accuracy, color=style.color, marker=style.marker, label="accuracy")
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        error = f"ECE {100 * group.mean('ece'):.1f}%"
        ax.text(0.04, 0.95, error, transform=ax.transAxes, va="top", color=style.color, weight="bold", bbox=box)
        ax.set_title(shortened_text(ax.get_title() or group.label, 44))
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 100)
        ax.set_aspect("equal")
        ax.set_xlabel("confidence (%)")
        ax.set_ylabel("accuracy (%)")
    note = f"{place_note(NAMES[:3], panels, 3)}{sample_note(panels)}. Line: accuracy of the images in a bin of confidence; grey "
    note += "bars: the share of images that it holds; ECE: expected calibration error, the mean over runs."
    return Chart(drawn, note + damage_note(query))


def bins(several: list[Predicted]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, share of images and accuracy of each bin [B], of all runs together; NaN where a bin is empty."""
    confidence = np.concatenate([of.probabilities.max(axis=1) for of in several])
    right = np.concatenate([of.predicted == of.labels for of in several])
    places = calibration_bins(confidence)
    count, summed, correct = (np.bincount(places, weights, CALIBRATION_BINS) for weights in (None, confidence, right))
    empty = np.where(count, count, np.nan)
    return summed / empty, count / len(confidence), correct / empty
