"""Risk-coverage curves by hand."""

import numpy as np
import pytest

from vipbench.harness.evaluation.metrics import Predicted, aurc
from vipbench.harness.evaluation.statistics.selective import risk_coverage


def predicted(confidence: list[float], right: list[int]) -> Predicted:
    """Predictions of class b of these log-odds."""
    return Predicted(np.array(right), np.column_stack([np.zeros(len(right)), confidence]), ["a", "b"])


def test_risk_of_the_most_confident_first() -> None:
    found = risk_coverage(predicted([1.0, 4.0, 3.0, 2.0], [0, 1, 0, 1]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.risk == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert found.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert aurc(predicted([1.0, 4.0, 3.0, 2.0], [0, 1, 0, 1])) == pytest.approx(found.aurc)
    assert found.coverage_at(0.4) == 0.75 and found.coverage_at(0.0) == 0.25 and found.coverage_at(-1) == 0


def test_ties_share_their_errors_in_any_order() -> None:
    for right in ([1, 0, 1], [0, 1, 1]):
        found = risk_coverage(predicted([2.0, 2.0, 1.0], right))
        assert found.risk == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert risk_coverage(predicted([2.0, 2.0], [1, 1])).aurc == 0
    assert risk_coverage(predicted([60.0, 90.0], [0, 1])).risk.tolist() == [0, 0.5], "probabilities are both 1.0"
