"""Metrics from predictions: thin, over scikit-learn. Fractions between 0 and 1."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn import metrics as sklearn_metrics

log = logging.getLogger(__name__)

CALIBRATION_BINS = 15


def compute_metrics(labels: np.ndarray, logits: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics of a set of predictions.

    Args:
        labels: [N] int64, N >= 1.
        logits: [N, C] float; the prediction is the first maximum.
        classes: C names.

    Returns:
        accuracy, majority_share (the accuracy of always guessing the most frequent class), balanced_accuracy (mean sensitivity
        of the classes that occur), macro_f1 (scikit-learn's macro average over the classes that occur in the labels, as Dassl),
        auroc (macro one-vs-rest over the classes that have both positives and negatives; None where there is none), ece
        (expected calibration error), sensitivity and specificity by class (None for a class without positives or negatives),
        samples (N).
    """
    assert len(labels) and logits.shape == (len(labels), len(classes))
    probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    occurring = np.unique(labels)
    confusion = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(len(classes)))
    positives, true_positives = confusion.sum(axis=1), np.diag(confusion)
    negatives, false_positives = len(labels) - positives, confusion.sum(axis=0) - true_positives
    sensitivity = [_ratio(hit, of) for hit, of in zip(true_positives, positives, strict=True)]
    specificity = [_ratio(of - wrong, of) for wrong, of in zip(false_positives, negatives, strict=True)]
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "majority_share": float(positives.max() / len(labels)),
        "balanced_accuracy": float(np.mean([value for value in sensitivity if value is not None])),
        "macro_f1": float(
            sklearn_metrics.f1_score(labels, predicted, labels=occurring, average="macro", zero_division=0)
        ),
        "auroc": _auroc(labels, logits, classes),
        "ece": expected_calibration_error(labels, probabilities),
        "sensitivity": dict(zip(classes, sensitivity, strict=True)),
        "specificity": dict(zip(classes, specificity, strict=True)),
        "samples": len(labels),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, C] of logits [N, C], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


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


def _auroc(labels: np.ndarray, logits: np.ndarray, classes: Sequence[str]) -> float | None:
    scores, left_out = [], []
    for index, name in enumerate(classes):
        is_class = labels == index
        if is_class.any() and not is_class.all():
            scores.append(sklearn_metrics.roc_auc_score(is_class, log_odds(logits, index)))
        else:
            left_out.append(name)
    if left_out:
        log.warning("auroc: leaves out %s, which the labels do not tell from the rest", ", ".join(left_out))
    return float(np.mean(scores)) if scores else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
