"""Measure a dataset for `vipbench symptoms improve`: features of its training and validation images, each computed once."""

from typing import TYPE_CHECKING

import numpy as np

from vipbench.harness.data.reader import Dataset
from vipbench.harness.models.phrases import as_sentence
from vipbench.harness.symptoms.pool import Images, Measured
from vipbench.harness.symptoms.worth import fold_numbers

if TYPE_CHECKING:
    from vipbench.harness.models.backbone import Backbone

TRAIN, VALIDATION = "train", "val"  # and no other split


def check_splits(dataset: Dataset) -> None:
    """Raise UserError where the training split is missing or too small to hold images out."""
    samples = dataset.split(TRAIN)
    fold_numbers(samples.labels, samples.patients, dataset.classes)


def measure(dataset: Dataset, backbone: "Backbone", *, batch_size: int = 64, workers: int = 0) -> Measured:
    """Encode the training images, and the validation images where there are any; other splits are not read."""
    from vipbench.harness.symptoms.encode import image_features, text_features

    def images(split: str) -> Images:
        samples = dataset.split(split)
        features = image_features(backbone, samples, batch_size, workers, f"encode {split} images")
        return Images(features.numpy(), samples.labels, samples.patients)

    def encode(texts: list[str]) -> np.ndarray:
        names = [f"symptom {text!r}" for text in texts]
        return text_features(backbone.text, [as_sentence(text) for text in texts], names).numpy()

    return Measured(
        classes=dataset.classes,
        train=images(TRAIN),
        validation=images(VALIDATION) if dataset.has(VALIDATION) else None,
        encode=encode,
        scale=float(backbone.logit_scale),
        identity={"data": dataset.info.digest, "backbone": backbone.digest},
    )
