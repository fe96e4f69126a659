"""Diagnosis cards of a page: test images and their cosine with every symptom (ViP, arXiv 2409.00341, Figure 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from vipbench.harness.errors import UserError
from vipbench.harness.report.page.entries import DONE, Entry
from vipbench.harness.report.page.samples import Predicted, thumbnail
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.symptom_evidence import Explainer, Symptoms, find_samples, run_samples

SIDE = 160  # pixels of the image
MOST_CLASSES = 3  # the most probable ones, and the truth


@dataclass(frozen=True)
class Card:
    """An image, its truth and prediction by a run, and for some classes their symptoms as (text, cosine, width of the bar)."""

    name: str
    image: str  # a data URL, "" for none
    truth: str
    predicted: str
    confidence: str
    right: bool
    run: int
    run_name: str
    classes: Sequence[tuple[str, str, Sequence[tuple[str, str, str]]]]


def diagnosis_cards(
    entries: Sequence[Entry], predicted: Predicted, most: int, images: bool
) -> tuple[list[Card], list[str]]:
    """Cards of the run of highest accuracy that reads symptoms, and sentences on why there are none.

    Its mistakes and its right answers take turns, each the most confident first. The code of plugins is not run, so that their
    runs have no cards.
    """
    able = [
        entry
        for entry in entries
        if entry.state == DONE
        and entry.row.get("symptoms")
        and not entry.source.bundle
        and not entry.row.get("run.plugins")
        and entry.number in predicted.runs
    ]
    if not able or most == 0:
        return [], []
    best = max(able, key=lambda entry: entry.metrics.get("accuracy") or 0.0)
    place, labels, confidences = predicted.runs[best.number]
    own = predicted.sets[place]
    chosen = _alternate(np.array(labels) == np.array(own.labels), np.array(confidences), most)
    try:
        run = Run(best.folder)
        samples = find_samples(run_samples(run, "test"), [own.ids[at] for at in chosen])
        explainer = Explainer(run)
        evidence = explainer.look_at(samples)
        pictures = [thumbnail(samples.image(at), SIDE) if images else "" for at in range(len(samples))]
    except (UserError, OSError) as error:
        return [], [f"No diagnosis cards of {best.name}: {error}"]
    if explainer.symptoms is None:
        return [], []
    probabilities = softmax(evidence.logits.astype(np.float64), axis=1)
    return [
        _card(best, own.ids[at], picture, run.classes, own.labels[at], chances, explainer.symptoms, cosines)
        for at, picture, chances, cosines in zip(chosen, pictures, probabilities, evidence.cosines, strict=True)
    ], []


def _alternate(right: np.ndarray, confidences: np.ndarray, most: int) -> list[int]:
    """Places of samples: mistakes and right answers in turns, the most confident first."""
    by_confidence = np.argsort(-confidences, kind="stable")
    wrong, correct = ([at for at in by_confidence.tolist() if right[at] == kind] for kind in (False, True))
    turns = [at for pair in zip(wrong, correct, strict=False) for at in pair]
    rest = [at for at in (*wrong, *correct) if at not in set(turns)]
    return [*turns, *rest][:most]


def _card(
    entry: Entry,
    name: str,
    picture: str,
    classes: Sequence[str],
    truth: int,
    chances: np.ndarray,
    symptoms: Symptoms,
    cosines: np.ndarray,
) -> Card:
    ranked = np.argsort(-chances, kind="stable").tolist()
    shown = list(dict.fromkeys([*ranked[:MOST_CLASSES], truth]))
    top = max(float(cosines.max()), 1e-6)

    def bars(label: int) -> list[tuple[str, str, str]]:
        own = np.flatnonzero(symptoms.owners == label)
        own = own[np.argsort(-cosines[own], kind="stable")]
        return [
            (symptoms.texts[at], f"{cosines[at]:.3f}", f"{100 * max(0.0, float(cosines[at])) / top:.1f}") for at in own
        ]

    return Card(
        name,
        picture,
        classes[truth],
        classes[ranked[0]],
        f"{100 * chances[ranked[0]]:.1f}",
        ranked[0] == truth,
        entry.number,
        entry.name,
        [(classes[label], f"{100 * chances[label]:.1f}", bars(label)) for label in shown],
    )
