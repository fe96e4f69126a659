"""Paired comparisons against scipy, statsmodels, MLstatkit, and against enumeration."""

from itertools import product

import numpy as np
import pytest
from MLstatkit.delong import Delong_test
from scipy.special import expit
from statsmodels.stats.contingency_tables import mcnemar

from tests.evaluation.statistics.drawn import pair
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.comparisons import (
    MCNEMAR,
    PERMUTATION,
    compare,
    compare_over_seeds,
    false_superiority,
    holm,
    sign_flip_test,
)
from vipbench.harness.evaluation.statistics.weighted import WEIGHTED


def test_of_independent_samples_the_permutation_test_is_mcnemars() -> None:
    for won, lost in ((7, 2), (5, 5), (0, 4), (30, 12), (0, 0)):
        differences = np.concatenate([np.ones(won, int), -np.ones(lost, int), np.zeros(20, int)])
        expected = mcnemar([[10, won], [lost, 10]], exact=True).pvalue if won + lost else 1.0
        assert sign_flip_test(differences) == pytest.approx(expected)


def test_of_patients_the_permutation_test_flips_each_whole() -> None:
    rng = np.random.default_rng(1)
    differences, patients = rng.integers(-1, 2, 40), rng.integers(0, 12, 40)
    sums = np.array([differences[patients == patient].sum() for patient in range(12)])
    flipped = [abs(np.dot(signs, sums)) for signs in product((-1, 1), repeat=12)]
    assert sign_flip_test(differences, patients) == pytest.approx(np.mean(np.array(flipped) >= abs(sums.sum())))
    assert sign_flip_test(np.tile(differences, 50)) == pytest.approx(
        mcnemar([[0, 50 * np.sum(differences > 0)], [50 * np.sum(differences < 0), 0]], exact=True).pvalue
    )


def test_accuracy_names_its_test() -> None:
    first, second, patients = pair(np.random.default_rng(2), 100, images=3)
    alone, together = compare("accuracy", first, second), compare("accuracy", first, second, patients)
    assert alone and together and alone.test == MCNEMAR and together.test == PERMUTATION
    assert alone.difference == pytest.approx(
        np.mean(first.predicted == first.labels) - np.mean(second.predicted == second.labels)
    )
    assert alone.samples == len(first.labels)


def test_delong_is_that_of_mlstatkit() -> None:
    first, second, _ = pair(np.random.default_rng(3), 120, classes=2)
    found = compare("auroc", first, second)
    z, p = Delong_test(
        first.labels, expit(first.log_odds[:, 1]), expit(second.log_odds[:, 1]), return_ci=False, return_auc=False
    )
    assert found and found.p == pytest.approx(p, rel=1e-6) and found.interval
    error = (found.interval.high - found.interval.low) / (2 * 1.959963984540054)
    assert abs(found.difference / error) == pytest.approx(abs(z), rel=1e-6)


@pytest.mark.parametrize("metric", sorted(set(WEIGHTED) - {"accuracy"}))
def test_an_interval_leaves_zero_out_where_the_test_rejects(metric: str) -> None:
    rejected = set()
    for draw in range(6):
        first, second, patients = pair(np.random.default_rng(draw), 150, images=2)
        better = Predicted(second.labels, second.logits + 0.35 * draw * np.eye(3)[second.labels], second.classes, True)
        found = compare(metric, first, better, patients, seed=draw)
        assert found and found.interval and found.p is not None
        if abs(found.p - 0.05) > 0.002:
            assert (found.p < 0.05) == (not found.interval.low <= 0 <= found.interval.high)
            rejected.add(found.p < 0.05)
    assert True in rejected


def test_the_same_predictions_do_not_differ() -> None:
    first, _, _ = pair(np.random.default_rng(4), 50)
    same = compare("accuracy", first, first)
    assert same and same.difference == 0 and same.p == 1 and same.interval is None
    f1 = compare("macro_f1", first, first)
    assert f1 and f1.difference == 0 and f1.p is None and f1.interval is None
    assert compare("samples", first, first) is None
    with pytest.raises(AssertionError):
        compare("accuracy", first, first.select(np.arange(10)))


def test_over_seeds_a_comparison_of_one_pair_is_that_pair() -> None:
    first, second, _ = pair(np.random.default_rng(5), 80)
    assert compare_over_seeds("macro_f1", [first], [second]) == compare("macro_f1", first, second)
    several = compare_over_seeds("macro_f1", [first, first], [second, second])
    one = compare("macro_f1", first, second)
    assert several and one and several.difference == pytest.approx(one.difference) and several.p is not None


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([None]) == [None] and holm([]) == []


def test_false_superiority_is_the_posterior_of_the_dirichlet() -> None:
    labels = np.zeros(100, np.int64)
    first = Predicted(labels, np.eye(2)[(np.arange(100) >= 80).astype(int)], ["a", "b"])  # 80 right
    second = Predicted(
        labels, np.eye(2)[(np.arange(100) % 100 < 28).astype(int)], ["a", "b"]
    )  # 72 right, of them 52 shared
    drawn = np.random.default_rng(6).dirichlet(1 + np.array([52, 28, 20, 0]), 400_000)
    assert false_superiority(first, second) == pytest.approx(np.mean(drawn[:, 1] <= drawn[:, 2]), abs=0.003)
    assert false_superiority(second, first) == pytest.approx(false_superiority(first, second))
    assert false_superiority(first, first) == pytest.approx(0.5)
    patients = np.repeat(np.arange(25), 4)
    assert false_superiority(first, second) < false_superiority(first, second, patients) < 0.5
