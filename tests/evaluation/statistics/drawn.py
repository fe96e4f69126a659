"""Predictions drawn from a known distribution, with patients whose images resemble each other."""

from functools import cache

import numpy as np

from vipbench.harness.evaluation.metrics import Predicted, compute_metrics

CLASSES = ["a", "b", "c"]
SHARES = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2]}


def draw(
    rng: np.random.Generator, patients: int, classes: int = 3, images: int = 1, signal: float = 1.2, scale: float = 1.5
) -> tuple[Predicted, np.ndarray]:
    """Predictions of 1 to `images` images of each patient, and the patient of each, [N] int.

    Args:
        signal: of the label in the logits, whose noise has a part of the patient and one of the image. scale: of the logits.
    """
    clusters = np.repeat(np.arange(patients), rng.integers(1, images, patients, endpoint=True))
    labels = rng.choice(classes, size=patients, p=SHARES[classes])[clusters]
    logits = 0.7 * rng.normal(size=(patients, classes))[clusters] + rng.normal(size=(len(clusters), classes))
    logits[np.arange(len(labels)), labels] += signal
    return Predicted(labels, (scale * logits).astype(np.float32), CLASSES[:classes], ordinal=True), clusters


def pair(
    rng: np.random.Generator, patients: int, classes: int = 3, images: int = 1
) -> tuple[Predicted, Predicted, np.ndarray]:
    """Two methods' predictions of the same samples, alike in distribution and correlated."""
    first, clusters = draw(rng, patients, classes, images)
    own = rng.normal(size=(patients, classes))[clusters] + rng.normal(size=first.logits.shape)
    other = rng.normal(size=(patients, classes))[clusters] + rng.normal(size=first.logits.shape)
    methods = [Predicted(first.labels, first.logits + noise, first.classes, True) for noise in (own, other)]
    return methods[0], methods[1], clusters


@cache
def truth(classes: int, images: int) -> dict[str, float]:
    """Metrics of a very large draw, sensitivity and specificity by class as "sensitivity[a]"."""
    of, _ = draw(np.random.default_rng(0), 300_000, classes, images)
    found: dict[str, float] = {}
    for name, value in compute_metrics(of.labels, of.logits, of.classes, ordinal=True).items():
        if isinstance(value, dict):
            found |= {f"{name}[{label}]": own for label, own in value.items()}
        else:
            found[name] = value
    return found
