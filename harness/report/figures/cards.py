"""Diagnosis cards: an image, its cosine with every symptom, prediction and truth (ViP, arXiv 2409.00341, Figure 3 II); and the
failure gallery of a run (Figure 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import softmax

from vipbench.harness.data.reader import Samples
from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import Tested, damage_note, one_group, read_tested
from vipbench.harness.report.figures.panels import free_figure
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import BLUE, GREY, PAGE, VERMILLION, shortened_text
from vipbench.harness.report.figures.symptom_rows import ROW, draw_rows, row_places
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.symptom_evidence import Evidence, Explainer, Symptoms, find_samples, run_samples

PICTURE_SIDE = 320  # pixels, at most, in a file
MOST_ROWS = 44  # of a card


@dataclass(frozen=True)
class Case:
    """An image and the evidence on it.

    Attributes:
        picture: RGB. probabilities: [C]. cosines: [P] with the symptoms. truth: position of its class; None where unknown.
        symptoms: None where the method reads none.
    """

    name: str
    picture: Image.Image
    classes: Sequence[str]
    probabilities: np.ndarray
    symptoms: Symptoms | None
    cosines: np.ndarray
    truth: int | None = None

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def colors(self) -> dict[int, str]:
        """The colours of classes: predicted, true where that is another one, and all others."""
        colors = dict.fromkeys(range(len(self.classes)), GREY)
        if self.truth is not None:
            colors[self.truth] = VERMILLION
        return colors | {self.predicted: BLUE}

    def header(self, label: int, letters: int = 40, marked: bool = True) -> str:
        """A class with its probability, and where `marked` if it was predicted or is the truth."""
        marks = [word for word, place in (("predicted", self.predicted), ("truth", self.truth)) if place == label]
        behind = f", {' and '.join(marks)}" if marks and marked else ""
        return f"{shortened_text(self.classes[label], letters)}: {100 * self.probabilities[label]:.1f}%{behind}"


def make_cases(
    names: Sequence[str],
    pictures: Sequence[Image.Image],
    classes: Sequence[str],
    evidence: Evidence,
    symptoms: Symptoms | None,
    truths: Sequence[int | None],
) -> list[Case]:
    """The cases of N images."""
    probabilities = softmax(evidence.logits.astype(np.float64), axis=1)
    rows = zip(names, pictures, probabilities, evidence.cosines, truths, strict=True)
    return [Case(name, picture, classes, own, symptoms, cosines, truth) for name, picture, own, cosines, truth in rows]


@figure("card", "image", "data")
def card(query: Query) -> Chart:
    """Draw the card of one test image of one run; by default the one that is predicted with the most confidence."""
    run, tested, chosen = _single_run(query, "card")
    of = tested.of
    key = query.image or str(tested.stored.ids[int(of.probabilities.max(axis=1).argmax())])
    samples = find_samples(run_samples(run, "test", query.data), [key])
    return draw_card(_cases(run, samples)[0], f" of {len(of.labels)} test images ({chosen})")


def draw_card(case: Case, of: str = "") -> Chart:
    """Draw a diagnosis card.

    Args:
        of: the number of images that it is one of, for the note.
    """
    note = f"n = 1 image{of}. "
    if case.symptoms is None:
        drawn, ax = _frame(case, 0.7 + ROW * min(len(case.classes), MOST_ROWS))
        _probability_bars(ax, case)
        return Chart(drawn, f"{note}Bars: probability of each class; the method reads no symptoms.")
    labels = np.argsort(-case.probabilities, kind="stable").tolist()
    if case.truth is not None and case.truth != case.predicted:  # beside the prediction, whatever its rank
        labels = [case.predicted, case.truth, *(own for own in labels if own not in (case.predicted, case.truth))]
    while len(labels) > 1 and len(row_places(case.symptoms, labels)[1]) + len(labels) > MOST_ROWS:
        labels.pop()
    shown, _, _ = row_places(case.symptoms, labels)
    drawn, ax = _frame(case, 0.6 + ROW * (len(shown) + len(labels)))
    colors = case.colors
    draw_rows(ax, case.symptoms, {label: case.header(label) for label in labels}, case.cosines, colors)
    ax.set_xlabel("cosine of image and symptom")
    note += f"Bars: cosine of the image with each of n = {len(shown)} symptoms, classes by probability."
    left_out = len(case.classes) - len(labels)
    return Chart(drawn, note + (f" {left_out} less probable classes are not shown." if left_out else ""))


@figure("gallery", "images", "data")
def gallery(query: Query) -> Chart:
    """Draw the test images that one run mistakes with the most confidence, with the symptoms of both classes."""
    run, tested, chosen = _single_run(query, "gallery")
    of = tested.of
    wrong = np.flatnonzero(of.predicted != of.labels)
    if not len(wrong):
        raise UserError(f"gallery: {run.path.name} makes no mistake on its {len(of.labels)} test images")
    order = wrong[np.argsort(-of.probabilities.max(axis=1)[wrong], kind="stable")][: query.images]
    samples = find_samples(run_samples(run, "test", query.data), [str(key) for key in tested.stored.ids[order]])
    cases = _cases(run, samples)
    every = np.concatenate([case.cosines for case in cases])
    limits = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
    rows = [cases[first : first + 2] for first in range(0, len(cases), 2)]
    heights = [max(map(_failure_height, row)) for row in rows]
    drawn = free_figure(PAGE, sum(heights))
    for place, case in enumerate(cases):
        row, column = divmod(place, 2)
        _failure(drawn, case, column * PAGE / 2, sum(heights[:row]), limits)
    bars = "cosines with the symptoms of both classes" if cases[0].symptoms else "probabilities"
    note = (
        f"n = {len(wrong)} mistakes among {len(of.labels)} test images ({chosen}); shown are the {len(cases)} of most "
    )
    return Chart(drawn, f"{note}confidence. Blue: predicted; red: the truth. Bars: {bars}.{damage_note(query)}")


def _single_run(query: Query, kind: str) -> tuple[Run, Tested, str]:
    """The run of a query, of several that differ in their seeds the first; its predictions, and its name."""
    group = one_group(query, kind)
    path = Path(group.runs[0]["run"])
    return Run(path), read_tested(path), path.name


def _cases(run: Run, samples: Samples) -> list[Case]:
    explainer = Explainer(run)
    evidence = explainer.look_at(samples)
    places = range(len(samples))
    names, pictures = [samples.key(place) for place in places], [samples.image(place) for place in places]
    return make_cases(names, pictures, run.classes, evidence, explainer.symptoms, samples.labels.tolist())


def _frame(case: Case, height: float) -> tuple[Figure, Axes]:
    """A figure with the picture at the left, and axes for bars at the right."""
    drawn = Figure(figsize=(PAGE, max(2.3, height)))
    grid = drawn.add_gridspec(1, 2, width_ratios=[1, 1.5], wspace=0.06)
    picture = drawn.add_subplot(grid[0])
    _show_picture(picture, case)
    _title(picture, case)
    picture.set_anchor("N")
    return drawn, drawn.add_subplot(grid[1])


def _show_picture(ax: Axes, case: Case) -> None:
    picture = case.picture.convert("RGB")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    ax.imshow(np.asarray(picture), interpolation="none")
    ax.axis("off")


def _title(ax: Axes, case: Case) -> None:
    predicted = case.classes[case.predicted]
    lines = [shortened_text(case.name, 34), f"predicted: {shortened_text(predicted, 30)}"]
    if case.truth is not None:
        right = "right" if case.truth == case.predicted else "wrong"
        lines.append(f"truth: {shortened_text(case.classes[case.truth], 30)} ({right})")
    ax.set_title("\n".join(lines), loc="left", fontsize=7)


def _probability_bars(ax: Axes, case: Case, most: int = MOST_ROWS, letters: int = 40) -> None:
    """Bars of the most probable classes."""
    labels = np.argsort(-case.probabilities, kind="stable")[:most].tolist()
    colors = case.colors
    ax.barh(range(len(labels)), 100 * case.probabilities[labels], color=[colors[label] for label in labels])
    ax.set_yticks(range(len(labels)), [case.header(label, letters - 16) for label in labels], fontsize=6.5)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel("probability (%)")
    ax.grid(axis="y", visible=False)


def _failure_labels(case: Case) -> list[int]:
    assert case.truth is not None
    return [case.predicted, case.truth]


def _failure_rows(case: Case) -> int:
    if case.symptoms is None:
        return min(len(case.classes), 5)
    return len(row_places(case.symptoms, _failure_labels(case))[1]) + 2


def _failure_height(case: Case) -> float:
    """Inches of a mistake: its heading, its picture or bars, and room below."""
    return 0.2 + max(0.95, ROW * _failure_rows(case)) + 0.3


def _failure(drawn: Figure, case: Case, left: float, top: float, limits: tuple[float, float]) -> None:
    """Draw a mistake at a place in inches: a heading over the picture and the bars beside it."""
    width, height = drawn.get_size_inches()

    def axes(x: float, y: float, wide: float, high: float) -> Axes:
        return drawn.add_axes(((left + x) / width, 1 - (top + y + high) / height, wide / width, high / height))

    _, truth = _failure_labels(case)
    heading = f"{shortened_text(case.name, 20)}: {case.classes[case.predicted]} instead of {case.classes[truth]}"
    drawn.text(left / width, 1 - (top + 0.12) / height, shortened_text(heading, 66), fontsize=7, va="center")
    _show_picture(axes(0, 0.2, 0.9, 0.9), case)
    bars = axes(2.6, 0.2, 0.75, ROW * _failure_rows(case))
    if case.symptoms is None:
        _probability_bars(bars, case, most=5, letters=36)
        bars.set_xlabel("")
        return
    headers = {label: case.header(label, 26, marked=False) for label in _failure_labels(case)}
    draw_rows(bars, case.symptoms, headers, case.cosines, case.colors, letters=33, limits=limits)
    bars.set_xticks([])
    bars.spines["bottom"].set_visible(False)
