"""Predict single images with a finished run, each with its symptom evidence: `vipbench predict RUN IMAGE...`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vipbench.harness.data.files import image_files, read_image
from vipbench.harness.report.figures.cards import Case, make_cases
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.evidence import BATCH, Explainer


def predict_files(run: Run, paths: Sequence[Path]) -> list[Case]:
    """The cases of image files, and of those in folders; their names are the paths as given.

    Raises:
        UserError: one is missing, damaged or no image.
    """
    files = image_files(paths)
    explainer = Explainer(run)
    pictures = [read_image(file) for file in files]
    transform = explainer.backbone.eval_transform

    def batches() -> Iterator[torch.Tensor]:
        for first in range(0, len(pictures), BATCH):
            yield torch.stack([transform(picture) for picture in pictures[first : first + BATCH]])

    evidence = explainer.look(batches(), len(files))
    names = [str(file) for file in files]
    return make_cases(names, pictures, run.classes, evidence, explainer.symptoms, [None] * len(files))


def to_json(run: Run, cases: Sequence[Case]) -> dict[str, Any]:
    """Predictions as JSON values.

    {"run", "classes", "images": [{"file", "prediction", "probabilities": {class: p}, "symptoms": [{"class", "symptom",
    "cosine", "weight"}]}]}; symptoms by cosine, the highest first, and weights where the method has them.
    """
    return {"run": run.path.name, "classes": run.classes, "images": [_image(case) for case in cases]}


def _image(case: Case) -> dict[str, Any]:
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
