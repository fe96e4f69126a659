"""Metrics of calibration, agreement and ordinal classes against values worked out by hand or by another package."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER, METRICS, compute_metrics

GRADES = ["none", "mild", "severe"]


def logits(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probabilities))


def test_brier_is_the_binary_score_for_two_classes() -> None:
    labels, positive = np.array([0, 1, 1, 0]), np.array([0.1, 0.7, 0.4, 0.3])
    found = compute_metrics(labels, np.log(np.column_stack([1 - positive, positive])), ["a", "b"])
    assert found["brier"] == pytest.approx(brier_score_loss(labels, positive))


def test_classwise_ece_is_the_mean_over_classes() -> None:
    values = logits([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.1, 0.46, 0.44], [0.1, 0.46, 0.44]])
    found = compute_metrics(np.array([0, 1, 1, 1]), values, GRADES)
    # of two samples each: "none" has gaps of 0.4 and 0.1, "mild" of 0.45 and 0.54, "severe" of 0.05 and 0.44
    assert found["classwise_ece"] == pytest.approx((0.25 + 0.495 + 0.245) / 3)
    assert found["ece"] == pytest.approx((0.4 + 0.54) / 2)


def test_average_precision_by_hand() -> None:
    scores = np.array([[0.0, 4.0], [0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    found = compute_metrics(np.array([1, 0, 1, 0]), scores, ["a", "b"])
    of_b, of_a = (1 + 2 / 3) / 2, (1 + 2 / 3) / 2
    assert found["average_precision"] == pytest.approx((of_a + of_b) / 2)


def test_mcc_by_hand_and_where_it_is_undefined() -> None:
    found = compute_metrics(np.array([0, 0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1, 1]], ["a", "b"])
    assert found["mcc"] == pytest.approx((2 * 2 - 1 * 0) / np.sqrt(3 * 3 * 2 * 2))
    assert compute_metrics(np.array([0, 1]), np.eye(2)[[0, 0]], ["a", "b"])["mcc"] == 0


def test_grades_have_a_kappa_and_a_mean_distance() -> None:
    labels, predicted = np.array([0, 1, 2, 2]), np.eye(3)[[0, 2, 0, 2]]
    found = compute_metrics(labels, predicted, GRADES, ordinal=True)
    assert found["mae"] == pytest.approx((0 + 1 + 2 + 0) / 4)
    observed = (0 + 1 + 4 + 0) / 4
    expected = np.mean([(label - other) ** 2 for label in labels for other in (0, 2, 0, 2)])
    assert found["quadratic_kappa"] == pytest.approx(1 - observed / expected)
    assert compute_metrics(labels, predicted, GRADES)["mae"] is None
    assert compute_metrics(labels, predicted, GRADES)["quadratic_kappa"] is None
    assert compute_metrics(np.array([1, 1]), np.eye(3)[[1, 1]], GRADES, ordinal=True)["quadratic_kappa"] is None


def test_errors_are_better_when_low() -> None:
    assert set(METRICS) > LOWER_IS_BETTER == {"ece", "classwise_ece", "brier", "aurc", "mae"}
