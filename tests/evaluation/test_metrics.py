"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from vipbench.harness.evaluation.metrics import compute_metrics, expected_calibration_error

CLASSES = ["a", "b", "c"]


def logits(predicted: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted] * 2


def test_counts_and_rates() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    result = compute_metrics(labels, logits([0, 0, 0, 1, 1, 0, 2, 2]), CLASSES)
    assert result["accuracy"] == 6 / 8
    assert result["sensitivity"] == {"a": 3 / 4, "b": 1 / 2, "c": 1.0}
    assert result["specificity"] == {"a": 3 / 4, "b": 5 / 6, "c": 1.0}
    assert result["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert result["macro_f1"] == pytest.approx((6 / 8 + 1 / 2 + 1) / 3)
    assert result["majority_share"] == 4 / 8
    assert result["samples"] == 8


def test_classes_that_do_not_occur_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    result = compute_metrics(np.array([0, 0, 1, 1]), logits([0, 0, 1, 2]), CLASSES)
    assert result["macro_f1"] == pytest.approx((1 + 2 / 3) / 2), "the mean is over a and b, not c"
    assert result["balanced_accuracy"] == pytest.approx(3 / 4)
    assert result["sensitivity"]["c"] is None
    assert result["auroc"] == pytest.approx((1 + 3 / 4) / 2), "the image taken for c ties with those of a"
    assert "auroc: leaves out c" in caplog.text
    assert compute_metrics(np.array([1, 1]), logits([1, 0]), CLASSES)["auroc"] is None


def test_auroc_is_the_chance_that_a_positive_scores_higher() -> None:
    scores = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, 4.0]])
    assert compute_metrics(np.array([0, 0, 1, 1]), scores, ["a", "b"])["auroc"] == pytest.approx(3 / 4)


def test_auroc_ranks_what_a_softmax_cannot_tell_apart() -> None:
    """With a gap of 60 every probability is 1 - 1e-26, which is 1.0 in float64."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    scores = np.array([[0.0, 60.0], [0.0, 61.0], [0.0, 64.0], [0.0, 62.0], [0.0, 63.0], [0.0, 65.0]])
    for others in (2, 3, 5):  # classes; the rest of them score the same everywhere
        logits = np.column_stack([scores, np.full((6, others - 2), -3.0)])
        classes = [f"class {number}" for number in range(others)]
        assert compute_metrics(labels, logits, classes)["auroc"] == pytest.approx(7 / 9)


def test_ece_is_the_weighted_gap_of_bins() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    # the bin of 0.9: half right, gap 0.4; the bin of 0.6: all right, gap 0.4
    assert expected_calibration_error(labels, probabilities) == pytest.approx(0.4)
    assert expected_calibration_error(np.array([0]), np.array([[1.0, 0.0]])) == 0.0
