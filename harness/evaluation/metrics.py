"""Metrics from predictions: thin, over scikit-learn. Fractions between 0 and 1.

A metric is a function decorated with `@metric`; it is in metrics.json of every run, in this order, under its own name.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.special import logsumexp, softmax
from sklearn import metrics as sklearn_metrics

log = logging.getLogger(__name__)

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predicted:
    """The predictions of N >= 1 samples.

    Attributes:
        labels: [N] int64.
        logits: [N, C] float.
        classes: C names.
    """

    labels: np.ndarray
    logits: np.ndarray
    classes: Sequence[str]

    @cached_property
    def predicted(self) -> np.ndarray:
        """[N] int64, the first of the highest logits."""
        return self.logits.argmax(axis=1)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """[N, C] float64."""
        return softmax(self.logits.astype(np.float64), axis=1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """[C, C] int64: samples by label and prediction."""
        return sklearn_metrics.confusion_matrix(self.labels, self.predicted, labels=range(len(self.classes)))


Metric = Callable[[Predicted], Any]
M = TypeVar("M", bound=Metric)
METRICS: dict[str, Metric] = {}


def metric(function: M) -> M:
    """Decorate a function of `Predicted`: its value (a JSON value, None where undefined) is a metric of every run."""
    assert function.__name__ not in METRICS, f"two metrics are called {function.__name__}"
    METRICS[function.__name__] = function
    return function


def compute_metrics(labels: np.ndarray, logits: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics of a set of predictions, by name.

    Args:
        labels: [N] int64, N >= 1.
        logits: [N, C] float; the prediction is the first maximum.
        classes: C names.
    """
    assert len(labels) and logits.shape == (len(labels), len(classes))
    predicted = Predicted(labels, logits, classes)
    return {name: function(predicted) for name, function in METRICS.items()}


@metric
def accuracy(of: Predicted) -> float:
    """The share of samples whose prediction is their label."""
    return float(np.mean(of.predicted == of.labels))


@metric
def majority_share(of: Predicted) -> float:
    """The accuracy of always guessing the most frequent class."""
    return float(of.confusion.sum(axis=1).max() / len(of.labels))


@metric
def balanced_accuracy(of: Predicted) -> float:
    """The mean sensitivity of the classes that occur."""
    return float(np.mean([value for value in sensitivity(of).values() if value is not None]))


@metric
def macro_f1(of: Predicted) -> float:
    """scikit-learn's macro average over the classes that occur in the labels, as in Dassl."""
    occurring = np.unique(of.labels)
    return float(sklearn_metrics.f1_score(of.labels, of.predicted, labels=occurring, average="macro", zero_division=0))


@metric
def auroc(of: Predicted) -> float | None:
    """The macro one-vs-rest AUROC over the classes that have both positives and negatives; None where there is none."""
    scores, left_out = [], []
    for index, name in enumerate(of.classes):
        is_class = of.labels == index
        if is_class.any() and not is_class.all():
            scores.append(sklearn_metrics.roc_auc_score(is_class, log_odds(of.logits, index)))
        else:
            left_out.append(name)
    if left_out:
        log.warning("auroc: leaves out %s, which the labels do not tell from the rest", ", ".join(left_out))
    return float(np.mean(scores)) if scores else None


@metric
def ece(of: Predicted) -> float:
    """The expected calibration error."""
    return expected_calibration_error(of.labels, of.probabilities)


@metric
def sensitivity(of: Predicted) -> dict[str, float | None]:
    """True positives among the positives of each class; None for a class without positives."""
    positives = of.confusion.sum(axis=1)
    return _ratios(of.classes, np.diag(of.confusion), positives)


@metric
def specificity(of: Predicted) -> dict[str, float | None]:
    """True negatives among the negatives of each class; None for a class without negatives."""
    negatives = len(of.labels) - of.confusion.sum(axis=1)
    false_positives = of.confusion.sum(axis=0) - np.diag(of.confusion)
    return _ratios(of.classes, negatives - false_positives, negatives)


@metric
def samples(of: Predicted) -> int:
    """N."""
    return len(of.labels)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Gap between confidence and accuracy over equal-width bins of the top probability (Guo et al., arXiv 1706.04599, eq. 3)."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are (k/bins, (k+1)/bins]
    counts = np.bincount(places, minlength=bins)
    gaps = np.abs(np.bincount(places, correct, bins) - np.bincount(places, confidence, bins))
    return float(gaps[counts > 0].sum() / len(labels))


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """Log-odds [N] float64 of a class against the others, from logits [N, C].

    They rank as the softmax probability does, which in floating point is 1 for all samples far from the decision boundary.
    """
    logits = logits.astype(np.float64)
    others = np.sort(
        np.delete(logits, label, axis=1), axis=1
    )  # so that equal numbers in another order are exactly tied
    return logits[:, label] - logsumexp(others, axis=1)


def _ratios(classes: Sequence[str], parts: np.ndarray, wholes: np.ndarray) -> dict[str, float | None]:
    """Quotients by class, None where the whole is zero."""
    counts = zip(classes, parts, wholes, strict=True)
    return {name: float(part / whole) if whole else None for name, part, whole in counts}
