"""Explain a run in the terminal: the weight of each symptom in its class, and its worth: `vipbench explain RUN`."""

from dataclasses import dataclass

import numpy as np

from vipbench.harness.errors import UserError
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.symptom_evidence import Explainer, Symptoms, Worth, run_samples
from vipbench.harness.symptoms.score import AUROC_MEANS

WEIGHT = (
    "weight: the part of the symptom in the feature of its class, by the merge prompt's attention; a class sums to 1 (with "
    "an attention sink to less)."
)
MEAN_WEIGHT = "weight: the part of the symptom in the feature of its class; this run takes their mean."
WITHOUT = (
    "without it: change of the run's balanced accuracy, in points, when the symptom is left out and the others take its weight; "
    "negative: it helps."
)
SELECTION = "Choose symptoms by training images (--split train), or the test result is no longer one: `vipbench symptoms score`."


@dataclass(frozen=True)
class Explanation:
    """The symptoms of a run, and their worth on the `images` of a split; None where it was not measured."""

    run: str
    classes: list[str]
    symptoms: Symptoms
    learned: bool
    split: str | None
    images: int
    worth: Worth | None


def explain_run(run: Run, split: str | None, data: str | None = None) -> Explanation:
    """Explain a run.

    Args:
        split: to measure the worth of symptoms on; None: it is not measured.
        data: where the run's dataset lies now; None: where it lay then.

    Raises:
        UserError: its method reads no symptoms, or the dataset is missing or another one.
    """
    if not run.config.symptoms:
        raise UserError(f"{run.path}: {run.config.method.name} reads no symptoms; there is nothing to explain by them")
    samples = run_samples(run, split, data) if split else None
    explainer = Explainer(run)
    assert explainer.symptoms is not None
    learned = getattr(run.config.method, "merge", None) == "attention"
    worth = explainer.worth(samples) if samples else None
    images = len(samples) if samples else 0
    return Explanation(run.path.name, run.classes, explainer.symptoms, learned, split, images, worth)


def show(found: Explanation) -> None:
    """Print the symptoms of each class, the heaviest first, and what the columns mean."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    symptoms, worth = found.symptoms, found.worth
    where = f", n = {found.images} {found.split} images" if worth else ""
    table = Table("class", "symptom", title=f"{found.run}{where}")
    columns = {
        "weight": symptoms.weights,
        "AUROC": worth.auroc if worth else None,
        "without it": 100 * worth.without if worth and worth.without is not None else None,
    }
    formats = {"weight": "{:.3f}", "AUROC": "{:.3f}", "without it": "{:+.2f}"}
    known = {name: values for name, values in columns.items() if values is not None}
    for name in known:
        table.add_column(name, justify="right")
    for label, name in enumerate(found.classes):
        own = np.flatnonzero(symptoms.owners == label)
        order = own if symptoms.weights is None else own[np.argsort(-symptoms.weights[own], kind="stable")]
        for place, row in enumerate(order):
            cells = [
                "–" if np.isnan(values[row]) else formats[key].format(values[row]) for key, values in known.items()
            ]
            table.add_row("" if place else name, symptoms.texts[row], *cells)
        table.add_section()
    console.print(table)
    sentences = {"weight": WEIGHT if found.learned else MEAN_WEIGHT, "AUROC": AUROC_MEANS, "without it": WITHOUT}
    for name in known:
        console.print(sentences[name])
    if worth and found.split != "train":
        console.print(SELECTION)
