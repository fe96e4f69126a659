"""Predict single images with a finished run, each with its symptom evidence: `vipbench predict RUN IMAGE...`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vipbench.harness.data.files import read_image
from vipbench.harness.report.figures.cards import Case, make_cases
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.symptom_evidence import BATCH, Explainer
from vipbench.harness.system.progress import Progress


def predict_files(run: Run, files: Sequence[Path]) -> Iterator[Case]:
    """The cases of image files, one after the other; their names are the paths.

    Raises:
        UserError: one is damaged or no image.
    """
    explainer = Explainer(run)
    transform = explainer.backbone.eval_transform
    with Progress("predict images", len(files), "images") as progress:
        for first in range(0, len(files), BATCH):
            batch = files[first : first + BATCH]
            pictures = [read_image(file) for file in batch]
            evidence = explainer.look(torch.stack([transform(picture) for picture in pictures]))
            names, truths = [str(file) for file in batch], [None] * len(batch)
            yield from make_cases(names, pictures, run.classes, evidence, explainer.symptoms, truths)
            progress.advance(len(batch))


def to_json(case: Case) -> dict[str, Any]:
    """A prediction as JSON values.

    {"file", "prediction", "probabilities": {class: p}, "symptoms": [{"class", "symptom", "cosine", "weight"}]}; symptoms by
    cosine, the highest first, with weights where the method has them, where it reads symptoms.
    """
    probabilities = {name: float(p) for name, p in zip(case.classes, case.probabilities, strict=True)}
    facts = {"file": case.name, "prediction": case.classes[case.predicted], "probabilities": probabilities}
    if case.symptoms is None:
        return facts
    texts, owners, weights = case.symptoms
    symptoms = []
    for place in (-case.cosines).argsort(kind="stable").tolist():
        row = {"class": case.classes[owners[place]], "symptom": texts[place], "cosine": float(case.cosines[place])}
        symptoms.append(row | ({} if weights is None else {"weight": float(weights[place])}))
    return facts | {"symptoms": symptoms}
