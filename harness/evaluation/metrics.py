"""Metrics from predictions: thin, over scikit-learn. Fractions between 0 and 1, but for correlations (-1 to 1) and `mae`.

A metric is a function decorated with `@metric`; it is in metrics.json of every run, in this order, under its own name.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.special import logsumexp, softmax
from sklearn import metrics as sklearn_metrics

log = logging.getLogger(__name__)

CALIBRATION_BINS = 15
LOWER_IS_BETTER = frozenset({"ece", "classwise_ece", "brier", "aurc", "mae"})


@dataclass(frozen=True)
class Predicted:
    """The predictions of N >= 1 samples.

    Attributes:
        labels: [N] int64.
        logits: [N, C] float.
        classes: C names.
        ordinal: their order is one of degree, such as grades of a disease.
    """

    labels: np.ndarray
    logits: np.ndarray
    classes: Sequence[str]
    ordinal: bool = False

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

    @cached_property
    def log_odds(self) -> np.ndarray:
        """[N, C] float64, of each class against the others."""
        return np.column_stack([log_odds(self.logits, label) for label in range(len(self.classes))])

    def select(self, chosen: np.ndarray) -> "Predicted":
        """Some of the samples, by position [n] int or by mask [N] bool."""
        return replace(self, labels=self.labels[chosen], logits=self.logits[chosen])


Metric = Callable[[Predicted], Any]
M = TypeVar("M", bound=Metric)
METRICS: dict[str, Metric] = {}


def metric(function: M) -> M:
    """Decorate a function of `Predicted`: its value (a JSON value, None where undefined) is a metric of every run."""
    assert function.__name__ not in METRICS, f"two metrics are called {function.__name__}"
    METRICS[function.__name__] = function
    return function


def compute_metrics(
    labels: np.ndarray, logits: np.ndarray, classes: Sequence[str], ordinal: bool = False
) -> dict[str, Any]:
    """All metrics of a set of predictions, by name.

    Args:
        labels: [N] int64, N >= 1.
        logits: [N, C] float; the prediction is the first maximum.
        classes: C names. ordinal: as in `Predicted`.
    """
    assert len(labels) and logits.shape == (len(labels), len(classes))
    predicted = Predicted(labels, logits, classes, ordinal)
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
    told = distinguishable(of)
    if len(told) < len(of.classes):
        left_out = [name for label, name in enumerate(of.classes) if label not in told]
        log.warning("auroc: leaves out %s, which the labels do not tell from the rest", ", ".join(left_out))
    return _one_vs_rest(of, sklearn_metrics.roc_auc_score)


@metric
def average_precision(of: Predicted) -> float | None:
    """The macro one-vs-rest average precision over the classes that `auroc` is over."""
    return _one_vs_rest(of, sklearn_metrics.average_precision_score)


@metric
def mcc(of: Predicted) -> float:
    """Matthews correlation coefficient of all classes (R_K of Gorodkin 2004), from -1 to 1; 0 where it is undefined."""
    return float(sklearn_metrics.matthews_corrcoef(of.labels, of.predicted))


@metric
def ece(of: Predicted) -> float:
    """The expected calibration error of the predicted class (top label)."""
    return expected_calibration_error(of.labels, of.probabilities)


@metric
def classwise_ece(of: Predicted) -> float:
    """The mean over classes of the calibration error of their probabilities (Kull et al., arXiv 1910.12656, eq. 3)."""
    errors = [
        _calibration_error(of.probabilities[:, label], of.labels == label, CALIBRATION_BINS)
        for label in range(len(of.classes))
    ]
    return float(np.mean(errors))


@metric
def brier(of: Predicted) -> float:
    """Half the mean squared distance of probabilities to the label's (Brier 1950), so that two classes give the binary score."""
    return float(np.mean(squared_distances(of)))


@metric
def aurc(of: Predicted) -> float:
    """The area under the risk-coverage curve: the mean of `selective_risks` (Geifman et al., arXiv 1805.08206)."""
    return float(np.mean(selective_risks(of)))


@metric
def quadratic_kappa(of: Predicted) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968), from -1 to 1; None unless classes are ordinal and vary."""
    if not of.ordinal or len(np.unique([of.labels, of.predicted])) < 2:
        return None
    return float(sklearn_metrics.cohen_kappa_score(of.labels, of.predicted, weights="quadratic"))


@metric
def mae(of: Predicted) -> float | None:
    """The mean distance of prediction and label, in classes; None unless they are ordinal."""
    return float(np.mean(np.abs(of.predicted - of.labels))) if of.ordinal else None


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
    return _calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)


def calibration_bins(confidence: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """The bin (k/bins, (k+1)/bins] of each confidence, as k."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def _calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    places = calibration_bins(confidence, bins)
    gaps = np.abs(np.bincount(places, correct, bins) - np.bincount(places, confidence, bins))
    return float(gaps.sum() / len(confidence))


def squared_distances(of: Predicted) -> np.ndarray:
    """Half the squared distance [N] of a sample's probabilities to those of its label."""
    distances = of.probabilities - np.eye(len(of.classes))[of.labels]
    return 0.5 * np.square(distances).sum(axis=1)


def selective_risks(of: Predicted) -> np.ndarray:
    """The share of errors [N] among the 1, 2, ..., N most confident samples.

    Confidence is the top probability, compared as log-odds; samples of equal confidence share their errors evenly.
    """
    _, level = np.unique(-of.log_odds.max(axis=1), return_inverse=True)
    ends = np.cumsum(np.bincount(level))
    errors = np.cumsum(np.bincount(level, of.predicted != of.labels))
    taken = np.arange(1, len(level) + 1)
    return np.interp(taken, np.concatenate([[0], ends]), np.concatenate([[0.0], errors])) / taken


def distinguishable(of: Predicted) -> list[int]:
    """The classes that have both positives and negatives."""
    counts = np.bincount(of.labels, minlength=len(of.classes))
    return [label for label, count in enumerate(counts) if 0 < count < len(of.labels)]


def _one_vs_rest(of: Predicted, score: Callable[[np.ndarray, np.ndarray], float]) -> float | None:
    scores = [score(of.labels == label, of.log_odds[:, label]) for label in distinguishable(of)]
    return float(np.mean(scores)) if scores else None


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
