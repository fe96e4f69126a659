"""Symptoms on images: boxes of the cosines of a symptom with its own class and with the others, and the extreme images."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes

from vipbench.harness.report.figures.panels import free_figure
from vipbench.harness.report.figures.registry import Chart
from vipbench.harness.report.figures.style import BLACK, BLUE, GREY, LIGHT_GREY, PAGE, shortened_text
from vipbench.harness.report.figures.symptom_rows import LETTERS
from vipbench.harness.symptoms.cosines import Cosines

ROW, MOST_ROWS = 0.26, 34  # of boxes: inches, and symptoms of a figure
SIDE, GAP = 0.62, 0.06  # of a thumbnail, inches
PIXELS = 96  # of a thumbnail
SHOWN = 4  # images at each end


def pages(found: Cosines) -> Iterator[list[int]]:
    """Classes in their order, as many together as a figure of boxes has room for."""
    page: list[int] = []
    rows = 0
    for label in range(len(found.classes)):
        own = int((found.owners == label).sum())
        if page and rows + own > MOST_ROWS:
            yield page
            page, rows = [], 0
        page.append(label)
        rows += own
    yield page


def draw_cosines(found: Cosines, aurocs: Sequence[float | None], labels: Sequence[int], split: str) -> Chart:
    """Draw for each symptom of some classes a box of the cosines of its own class, and below it one of all other images."""
    symptoms = [int(place) for label in labels for place in np.flatnonzero(found.owners == label)]
    rows = len(symptoms) + len(labels)
    drawn = free_figure(PAGE, 0.6 + ROW * rows)
    ax = drawn.add_axes((0.42, 0.45 / drawn.get_figheight(), 0.5, 1 - 0.5 / drawn.get_figheight()))
    ticks: list[str] = []  # one a row
    heads: list[int] = []  # rows of class names
    for label in labels:
        heads.append(len(ticks))
        ticks.append(found.classes[label])
        for symptom in (place for place in symptoms if found.owners[place] == label):
            own, column, row = found.of_class(symptom), found.cosines[:, symptom], len(ticks)
            for values, offset, color in ((column[own], -0.2, BLUE), (column[~own], 0.2, LIGHT_GREY)):
                _box(ax, values, row + offset, color)
            area = aurocs[symptom]
            shown = "–" if area is None else f"{area:.2f}"
            ax.text(1.02, row, shown, transform=ax.get_yaxis_transform(), va="center", fontsize=6.5)
            ticks.append(found.texts[symptom])
    ax.text(1.02, -0.9, "AUROC", transform=ax.get_yaxis_transform(), va="center", fontsize=6.5)
    ax.set_yticks(range(rows), [shortened_text(text, LETTERS) for text in ticks], fontsize=6.5)
    for row in heads:
        ax.get_yticklabels()[row].set_fontweight("bold")
    ax.set_ylim(rows - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("cosine of image and symptom")
    counts = [int((found.samples.labels == label).sum()) for label in labels]
    sizes = ", ".join(f"{found.classes[label]} {count:,}" for label, count in zip(labels, counts, strict=True))
    note = f"n = {len(found.samples):,} {split} images ({sizes} here). Blue: images of the symptom's class, grey: all others; "
    return Chart(
        drawn, f"{note}box: quartiles, line: median, whiskers: 5% to 95%. AUROC: of the class against all others."
    )


def _box(ax: Axes, values: np.ndarray, place: float, color: str) -> None:
    if len(values):
        ax.boxplot(
            values,
            positions=[place],
            widths=0.32,
            orientation="horizontal",
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": color, "linewidth": 0.4},
            medianprops={"color": BLACK, "linewidth": 1.0},
            whiskerprops={"linewidth": 0.5},
            capprops={"linewidth": 0.5},
        )


def draw_images(found: Cosines, label: int, split: str) -> Chart:
    """Draw for each symptom of a class the images that agree most with it, and those of the class that agree least.

    Raises:
        UserError: an image is damaged.
    """
    symptoms = [int(place) for place in np.flatnonzero(found.owners == label)]
    high, text_width = SIDE + 0.2 + GAP, 1.7
    drawn = free_figure(PAGE, 0.45 + high * len(symptoms))
    width, height = drawn.get_size_inches()
    side = min(SIDE, (width - text_width - 0.2) / (2 * SHOWN) - GAP)
    halves = (text_width, text_width + SHOWN * (side + GAP) + 0.15)
    for left, title in zip(halves, ("agree most, of all classes", "agree least, of this class"), strict=True):
        drawn.text(left / width, 1 - 0.3 / height, title, fontsize=7, va="center")
    drawn.text(0.01, 1 - 0.1 / height, found.classes[label], fontsize=8, fontweight="bold", va="center")
    for row, symptom in enumerate(symptoms):
        top = 0.4 + high * row
        words = _wrapped(found.texts[symptom])
        drawn.text(0.01, 1 - (top + side / 2) / height, words, fontsize=7, va="center")
        for left, places in zip(halves, (found.most(symptom, SHOWN), found.least(symptom, SHOWN)), strict=True):
            for number, place in enumerate(places):
                x = left + number * (side + GAP)
                ax = drawn.add_axes((x / width, 1 - (top + side) / height, side / width, side / height))
                _thumbnail(ax, found, place, own=found.samples.labels[place] == label)
                ax.set_xlabel(f"{found.cosines[place, symptom]:.3f}".replace("-", "−"), fontsize=6, labelpad=2)
    note = f"n = {len(found.samples):,} {split} images. Below each image: its cosine with the symptom. Blue frame: an image of "
    return Chart(drawn, f"{note}the class {found.classes[label]}, grey: of another one.")


def _thumbnail(ax: Axes, found: Cosines, place: int, own: bool) -> None:
    picture = found.samples.image(place)
    picture.thumbnail((PIXELS, PIXELS))
    ax.imshow(np.asarray(picture), interpolation="none")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(BLUE if own else GREY)
        spine.set_linewidth(1.8 if own else 0.8)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(shortened_text(text, 100), 30))
