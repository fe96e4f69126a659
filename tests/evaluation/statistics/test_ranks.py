"""Average ranks and critical differences against scikit-posthocs and the paper's example."""

import numpy as np
import pytest
import scikit_posthocs
from scipy.stats import friedmanchisquare

from vipbench.harness.evaluation.statistics.ranks import average_ranks


def test_ranks_share_ties_and_come_best_first() -> None:
    found = average_ranks(np.array([[0.9, 0.8, 0.9], [0.5, 0.7, 0.6]]), ["a", "b", "c"])
    assert found.names == ["c", "b", "a"] and found.average.tolist() == [1.75, 2.0, 2.25] and found.datasets == 2
    lower = average_ranks(np.array([[0.1, 0.2], [0.3, 0.4]]), ["a", "b"], lower_is_better=True)
    assert lower.names == ["a", "b"] and lower.average.tolist() == [1, 2] and lower.friedman_p is None


def test_critical_difference_of_demsars_example() -> None:
    found = average_ranks(np.random.default_rng(0).random((14, 4)), list("abcd"))
    assert found.critical_difference == pytest.approx(1.25, abs=0.005), "four methods on 14 datasets (JMLR 2006, p. 15)"


def test_p_values_are_those_of_scikit_posthocs_and_scipy() -> None:
    scores = np.random.default_rng(1).random((9, 5)) + 0.3 * np.arange(5)
    names = list("abcde")
    found = average_ranks(scores, names)
    order = [names.index(name) for name in found.names]
    expected = scikit_posthocs.posthoc_nemenyi_friedman(scores).to_numpy()[np.ix_(order, order)]
    np.testing.assert_allclose(found.p[~np.eye(5, dtype=bool)], expected[~np.eye(5, dtype=bool)], atol=2e-3)
    assert found.friedman_p == pytest.approx(friedmanchisquare(*scores.T).pvalue)
    for first, last in found.groups:
        assert found.average[last] - found.average[first] <= found.critical_difference
        assert found.p[first, last] >= 0.05 - 1e-6


def test_groups_are_as_wide_as_they_may_be() -> None:
    scores = np.tile([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], (12, 1))
    found = average_ranks(scores, list("abcdef"))
    assert 2 < found.critical_difference < 3
    assert found.groups == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_friedman_keeps_its_level() -> None:
    rng = np.random.default_rng(2)
    rejected = [(average_ranks(rng.random((15, 4)), list("abcd")).friedman_p or 1) < 0.05 for _ in range(1000)]
    assert 0.03 < np.mean(rejected) < 0.065
