"""Metrics of resamples from weighted sums are the metrics of the resampled samples."""

import numpy as np
import pytest

from tests.evaluation.statistics.drawn import draw
from vipbench.harness.evaluation.metrics import METRICS, Predicted, compute_metrics
from vipbench.harness.evaluation.statistics.bootstrap import cluster_codes, replicate
from vipbench.harness.evaluation.statistics.weighted import WEIGHTED, Clustered, Resampled, weighted_metric


@pytest.mark.parametrize("classes", [2, 3])
def test_a_resample_has_the_metrics_of_its_samples(classes: int) -> None:
    of, clusters = draw(np.random.default_rng(3), 60, classes, images=3)
    rounded = Predicted(of.labels, np.round(of.logits), of.classes, ordinal=True)  # with ties
    counts = np.random.default_rng(4).integers(0, 4, (60, 5)).astype(np.float32)
    for predicted in (of, rounded):
        resampled = Resampled(Clustered(predicted, clusters, 60), counts)
        for column in range(5):
            repeated = predicted.select(np.repeat(np.arange(len(clusters)), counts[clusters, column].astype(int)))
            expected = compute_metrics(repeated.labels, repeated.logits, repeated.classes, ordinal=True)
            for name, weighted in WEIGHTED.items():
                assert weighted(resampled)[column] == pytest.approx(expected[name], abs=1e-5), name
            for name in ("sensitivity", "specificity"):
                for label, value in expected[name].items():
                    rate = weighted_metric(f"{name}[{label}]", predicted)
                    assert rate is not None and rate(resampled)[column] == pytest.approx(value, abs=1e-6)


def test_every_metric_of_a_run_has_a_weighted_form_or_is_known_to_need_none() -> None:
    assert set(METRICS) - set(WEIGHTED) == {"majority_share", "sensitivity", "specificity", "samples"}


def test_a_class_that_a_resample_lacks_is_left_out_of_it() -> None:
    of = Predicted(np.array([0, 0, 1]), np.array([[1.0, 0], [0, 1], [0, 1]]), ["a", "b"])
    counts = np.array([[1], [1], [0]], np.float32)
    resampled = Resampled(Clustered(of, np.arange(3), 3), counts)
    assert WEIGHTED["balanced_accuracy"](resampled)[0] == 0.5
    assert np.isnan(WEIGHTED["auroc"](resampled)[0]) and np.isnan(WEIGHTED["average_precision"](resampled)[0])


def test_metrics_of_grades_are_for_ordinal_classes_only() -> None:
    of = Predicted(np.array([0, 1]), np.eye(2), ["a", "b"])
    assert weighted_metric("mae", of) is None and weighted_metric("sensitivity[c]", of) is None


def test_the_first_values_are_the_metric_and_its_jackknife() -> None:
    of, clusters = draw(np.random.default_rng(5), 40, images=2)
    found = replicate(["macro_f1"], [of], clusters)["macro_f1"][0]
    kept = [clusters != patient for patient in range(40)]
    left = [compute_metrics(part.labels, part.logits, part.classes)["macro_f1"] for part in map(of.select, kept)]
    assert found.estimate == pytest.approx(compute_metrics(of.labels, of.logits, of.classes)["macro_f1"])
    np.testing.assert_allclose(np.sort(found.jackknife), np.sort(left), atol=1e-6)
    assert len(found.resampled) == 1000
    again = replicate(["macro_f1"], [of], clusters)["macro_f1"][0]
    np.testing.assert_array_equal(found.resampled, again.resampled)


def test_samples_without_a_patient_are_clusters_of_their_own() -> None:
    codes = cluster_codes(["p1", None, "p2", "p1", None])
    assert codes is not None and codes.tolist() == [0, 1, 2, 0, 3]
    assert cluster_codes([None, None]) is None and cluster_codes(None) is None
