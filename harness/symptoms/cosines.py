"""Cosines of the images of a split with every symptom of a set: their distributions by class, and the extreme images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.models.phrases import as_sentence
from vipbench.harness.symptoms.sets import SymptomSet

if TYPE_CHECKING:
    from vipbench.harness.models.backbone import Backbone

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Cosines(NamedTuple):
    """The cosines [N, P] of N samples with P symptoms.

    Attributes:
        texts: P symptoms, class by class. owners: [P] int64, the class of each.
        samples: N samples of the classes.
    """

    classes: Sequence[str]
    texts: Sequence[str]
    owners: np.ndarray
    samples: Samples
    cosines: np.ndarray

    def of_class(self, symptom: int) -> np.ndarray:
        """[N] bool, the images of the class that a symptom belongs to."""
        return self.samples.labels == self.owners[symptom]

    def most(self, symptom: int, count: int) -> list[int]:
        """The places of the images that agree most with a symptom, of all classes, the first one most."""
        return [int(place) for place in np.argsort(-self.cosines[:, symptom], kind="stable")[:count]]

    def least(self, symptom: int, count: int) -> list[int]:
        """The places of the images of the symptom's own class that agree least with it, the first one least."""
        own = np.flatnonzero(self.of_class(symptom))
        order = np.argsort(self.cosines[own, symptom], kind="stable")[:count]
        return [int(place) for place in own[order]]


def measure_cosines(
    symptoms: SymptomSet,
    dataset: Dataset,
    backbone: "Backbone",
    split: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> Cosines:
    """Encode the images of a split and the symptoms of a set.

    Raises:
        UserError: a class of the dataset is not in the set or has no symptom; there is no such split.
    """
    from vipbench.harness.methods.base import symptom_names
    from vipbench.harness.symptoms.encode import image_features, text_features

    groups, samples = symptoms.texts(dataset.classes), dataset.split(split)
    texts = [text for group in groups for text in group]
    encoded = text_features(backbone.text, [*map(as_sentence, texts)], symptom_names(dataset.classes, groups))
    images = image_features(backbone, samples, batch_size, workers, f"encode {split} images")
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return Cosines(dataset.classes, texts, owners, samples, (images @ encoded.T).numpy())


def describe(found: Cosines, aurocs: Sequence[float | None], count: int) -> list[dict[str, Any]]:
    """Describe each symptom as JSON values: its AUROC, the distribution of its cosine in each class, `count` extreme images."""
    described = []
    for symptom, text in enumerate(found.texts):
        column, labels = found.cosines[:, symptom], found.samples.labels
        described.append(
            {
                "class": found.classes[found.owners[symptom]],
                "text": text,
                "auroc": aurocs[symptom],
                "cosine": {name: _distribution(column[labels == of]) for of, name in enumerate(found.classes)},
                "most": [_image(found, place, symptom) for place in found.most(symptom, count)],
                "least_of_its_class": [_image(found, place, symptom) for place in found.least(symptom, count)],
            }
        )
    return described


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """The number of values, and where there are some their mean and `QUANTILES`."""
    if not len(values):
        return {"images": 0}
    quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES), strict=True))
    figures = {"mean": values.mean(), **quantiles}
    return {"images": len(values), **{name: round(float(value), 6) for name, value in figures.items()}}


def _image(found: Cosines, place: int, symptom: int) -> dict[str, Any]:
    return {
        "id": found.samples.key(place),
        "class": found.classes[found.samples.labels[place]],
        "cosine": round(float(found.cosines[place, symptom]), 6),
    }
