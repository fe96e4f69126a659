"""Conformal sets against MAPIE and by hand, and the halves that keep calibration apart."""

import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from scipy.stats import kstest
from sklearn.base import BaseEstimator, ClassifierMixin

from tests.evaluation.statistics.drawn import draw
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.conformal import SCORES, conformal_sets, halves, repeated_sets


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose inputs are its probabilities."""

    classes_ = np.arange(3)
    is_fitted_ = True

    def predict_proba(self, inputs: np.ndarray) -> np.ndarray:
        return inputs

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return inputs.argmax(axis=1)


def test_lac_is_that_of_mapie() -> None:
    calibration, _ = draw(np.random.default_rng(1), 150, scale=0.8)
    test, _ = draw(np.random.default_rng(2), 100, scale=0.8)
    mapie = SplitConformalClassifier(Given(), confidence_level=0.9, conformity_score="lac", prefit=True)
    mapie.conformalize(calibration.probabilities, calibration.labels)
    found = conformal_sets("lac", calibration, test)
    np.testing.assert_array_equal(found.sets, mapie.predict_set(test.probabilities)[1][:, :, 0])
    assert found.size == pytest.approx(found.sets.sum(axis=1).mean()) and found.calibration == 150


def test_aps_is_that_of_mapie_up_to_the_random_part() -> None:
    test, _ = draw(np.random.default_rng(2), 400, scale=0.8)
    mapie = SplitConformalClassifier(Given(), confidence_level=0.9, conformity_score="aps", prefit=True)
    mapie.conformalize(test.probabilities, test.labels)
    scores = np.ravel(mapie._mapie_classifier.conformity_scores_)
    place = np.arange(400), test.labels
    parts = (scores - SCORES["aps"](test.probabilities, np.zeros((400, 1)))[place]) / test.probabilities[place]
    assert kstest(parts, "uniform").pvalue > 0.01, "of a class's own probability they take a uniform part"


def test_scores_by_hand() -> None:
    probabilities, part = np.array([[0.2, 0.7, 0.1]]), np.array([[0.5]])
    assert SCORES["lac"](probabilities, part)[0] == pytest.approx([0.8, 0.3, 0.9])
    assert SCORES["aps"](probabilities, part)[0] == pytest.approx([0.7 + 0.1, 0.35, 0.9 + 0.05])
    assert SCORES["raps"](probabilities, part)[0] == pytest.approx([0.8 + 0.1, 0.35, 0.95 + 0.2])


def test_the_threshold_is_an_order_statistic() -> None:
    positive = np.linspace(0.05, 0.95, 19)
    of = Predicted(np.ones(19, np.int64), np.log(np.column_stack([1 - positive, positive])), ["a", "b"])
    found = conformal_sets("lac", of, of)
    assert found.threshold == pytest.approx(0.9), "the 18th of 19 scores, since 0.9 * 20 = 18"
    assert (
        found.coverage == pytest.approx(18 / 19)
        and found.interval
        and found.coverage_by_class == {"a": None, "b": 18 / 19}
    )
    few = conformal_sets("lac", of.select(np.arange(8)), of)
    assert few.threshold == np.inf and few.sets.all(), "8 samples cannot show a coverage of 0.9"


def test_halves_keep_patients_whole() -> None:
    clusters = np.repeat(np.arange(20), 3)
    calibration, test = halves(60, clusters, seed=3)
    assert not (calibration & test).any() and calibration.sum() == 30
    assert not set(clusters[calibration]) & set(clusters[test])
    assert not np.array_equal(calibration, halves(60, clusters, seed=4)[0])


@pytest.mark.parametrize("score", sorted(SCORES))
def test_repeated_halves_average_those_of_single_ones(score: str) -> None:
    of, clusters = draw(np.random.default_rng(3), 80, images=3, scale=0.8)
    found = repeated_sets(score, of, clusters, repeats=5, seed=7)
    masks = [halves(len(of.labels), clusters, seed)[0] for seed in range(7, 12)]
    single = [conformal_sets(score, of.select(own), of.select(~own)) for own in masks]
    tolerance = 1e-9 if score == "lac" else 0.1  # the others draw random parts anew
    assert found.coverage == pytest.approx(np.mean([one.coverage for one in single]), abs=tolerance)
    assert found.size == pytest.approx(np.mean([one.size for one in single]), abs=3 * tolerance)
    assert found.patients and found.worst and found.worst[1] == min(filter(None, found.coverage_by_class.values()))
    assert found.calibration == np.mean([one.calibration for one in single])
    assert found.calibration + found.test == len(of.labels)
    assert found.coverage_range[0] < found.coverage < found.coverage_range[1]
    if score == "lac":
        for name, mean in found.coverage_by_class.items():
            assert mean == pytest.approx(np.mean([one.coverage_by_class[name] for one in single]))


def test_repeated_halves_without_enough_to_calibrate_hold_every_class() -> None:
    found = repeated_sets(
        "lac", Predicted(np.array([0, 1, 1, 0]), np.eye(2)[[0, 1, 1, 0]], ["a", "b", "c"][:2]), repeats=3
    )
    assert not found.patients, "each sample is one"
    assert (found.coverage, found.size, found.calibration, found.test) == (1, 2, 2, 2)
