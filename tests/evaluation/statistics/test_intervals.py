"""Intervals against closed forms and against scipy, statsmodels and confidenceinterval."""

import json

import confidenceinterval
import numpy as np
import pytest
from confidenceinterval.delong import delong_roc_variance
from scipy.stats import bootstrap
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from tests.evaluation.statistics.drawn import CLASSES, draw
from vipbench.harness.evaluation.metrics import Predicted, squared_distances
from vipbench.harness.evaluation.statistics.bootstrap import Replicates
from vipbench.harness.evaluation.statistics.delong import delong
from vipbench.harness.evaluation.statistics.intervals import (
    BCA,
    DELONG,
    Interval,
    effective_samples,
    from_json,
    interval,
    interval_over_seeds,
    intervals,
    spread_over_seeds,
    to_json,
    wilson,
)


def ends(found: Interval | None) -> tuple[float, float]:
    assert found is not None
    return found.low, found.high


def test_wilson_of_8_in_10_by_its_formula() -> None:
    z, n, p = 1.959963984540054, 10, 0.8
    centre, reach = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    found = wilson(np.arange(10) < 8, None)
    assert ends(found) == pytest.approx((centre - reach, centre + reach)) and found and found.method == "Wilson"
    low, high = ends(wilson(np.ones(10, bool), None))
    assert low == pytest.approx(1 / (1 + z**2 / n)) and high == pytest.approx(1)
    assert wilson(np.ones(0, bool), None) is None


def test_accuracy_and_rates_are_those_of_confidenceinterval() -> None:
    of, _ = draw(np.random.default_rng(1), 200, classes=2)
    _, expected = confidenceinterval.accuracy_score(of.labels, of.predicted, confidence_level=0.95, method="wilson")
    assert ends(interval("accuracy", of)) == pytest.approx(expected, abs=1e-6)
    for name, score in (
        ("sensitivity", confidenceinterval.tpr_score),
        ("specificity", confidenceinterval.tnr_score),
    ):
        _, expected = score(of.labels, of.predicted, confidence_level=0.95, method="wilson")
        assert ends(interval(f"{name}[b]", of)) == pytest.approx(expected, abs=1e-6)


def test_copies_of_an_image_add_nothing() -> None:
    right = np.random.default_rng(2).random(40) < 0.7
    copies, patients = np.repeat(right, 5), np.repeat(np.arange(40), 5)
    small_sample = (student.ppf(0.975, 39) / 1.959963984540054) ** 2 * 40 / 39
    assert effective_samples(copies, patients) == pytest.approx(40 / small_sample)
    assert effective_samples(np.ones(200), patients) == 40, "values that are all the same show no correlation"
    low, high = ends(wilson(copies, patients))
    assert high - low > 1.9 * np.subtract(*ends(wilson(copies, None))[::-1])
    assert wilson(right, np.arange(40)) == wilson(right, None)


def test_delong_is_that_of_another_implementation() -> None:
    of, _ = draw(np.random.default_rng(3), 150, classes=2)
    scores = np.round(of.log_odds[:, 1], 1)  # with ties
    areas, covariance = delong([scores, of.log_odds[:, 1]], of.labels == 1)
    for place, values in enumerate((scores, of.log_odds[:, 1])):
        area, variance = delong_roc_variance(of.labels, values)
        assert areas[place] == pytest.approx(area) and covariance[place, place] == pytest.approx(float(variance))
    doubled, clusters = np.tile(np.arange(150), 3), np.tile(np.arange(150), 3)
    again, clustered = delong([scores[doubled]], (of.labels == 1)[doubled], clusters)
    assert again[0] == pytest.approx(areas[0]) and clustered[0, 0] == pytest.approx(covariance[0, 0])


def test_delong_over_patients_of_both_classes_is_close_to_the_jackknife() -> None:
    rng = np.random.default_rng(15)
    positive, clusters = rng.random(600) < 0.5, np.repeat(np.arange(200), 3)
    scores = positive + 2 * rng.normal(size=200)[clusters] + 0.5 * rng.normal(size=600)
    _, covariance = delong([scores], positive, clusters)
    left = [roc_auc_score(positive[kept], scores[kept]) for kept in (clusters != patient for patient in range(200))]
    assert covariance[0, 0] == pytest.approx(199 / 200 * np.square(left - np.mean(left)).sum(), rel=0.03)


def test_delongs_interval_is_on_the_logit_scale() -> None:
    of, _ = draw(np.random.default_rng(3), 150, classes=2)
    area, variance = delong_roc_variance(of.labels, of.log_odds[:, 1])
    reach = 1.959963984540054 * np.sqrt(variance) / (area * (1 - area))
    low, high = ends(found := interval("auroc", of))
    odds = np.log(area / (1 - area))
    assert np.log(np.array([low, high]) / (1 - np.array([low, high]))) == pytest.approx([odds - reach, odds + reach])
    assert found and found.method == DELONG


def test_bca_is_scipys() -> None:
    of, _ = draw(np.random.default_rng(4), 60)
    values = squared_distances(of)
    expected = bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5))
    low, high = expected.confidence_interval
    found = interval("brier", of)
    assert found and found.method == BCA
    assert ends(found) == pytest.approx((low, high), abs=0.06 * (high - low))
    percentile = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5))
    assert found.high - percentile.confidence_interval.high > 0.25 * (high - percentile.confidence_interval.high)


def test_bca_of_a_skewed_statistic_moves_with_its_jackknife() -> None:
    values = np.random.default_rng(6).exponential(size=30)
    resampled = np.random.default_rng(7).choice(values, (2000, 30)).mean(axis=1)
    jackknife = (values.sum() - values) / 29
    found = Replicates(float(values.mean()), jackknife, resampled).interval()
    expected = bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(8))
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.06)
    assert found and found[1] > np.quantile(resampled, 0.98)


def test_what_does_not_vary_has_no_interval() -> None:
    labels = np.array([0, 1] * 20)
    of = Predicted(labels, np.eye(2)[labels], ["a", "b"])
    found = intervals(of)
    assert found["auroc"] is None and found["macro_f1"] is None and found["accuracy"] is not None
    assert "macro_f1" not in to_json(found)
    one_class = Predicted(np.zeros(5, np.int64), np.random.default_rng(0).normal(size=(5, 3)), CLASSES)
    found = intervals(one_class)
    assert found["auroc"] is None and found["sensitivity"]["b"] is None  # type: ignore[index]
    assert interval("auroc", one_class) is None and interval("samples", one_class) is None


def test_one_patient_shows_nothing_of_others() -> None:
    of, _ = draw(np.random.default_rng(14), 30)
    found = intervals(of, np.zeros(30, np.int64))
    assert found["mcc"] is None and found["brier"] is None
    low, high = ends(found["accuracy"])  # type: ignore[arg-type]
    assert high - low > 0.7, "as of one sample"


def test_intervals_of_a_run_are_the_same_each_time_and_survive_json() -> None:
    of, clusters = draw(np.random.default_rng(9), 80, images=3)
    found, again = to_json(intervals(of, clusters)), to_json(intervals(of, clusters))
    assert found == again
    read = from_json(json.loads(json.dumps(found)))
    assert to_json(read) == found
    assert set(found) == {
        *(
            "accuracy",
            "balanced_accuracy",
            "macro_f1",
            "auroc",
            "average_precision",
            "mcc",
            "ece",
            "classwise_ece",
            "brier",
            "aurc",
        ),
        *("quadratic_kappa", "mae", "sensitivity", "specificity"),
    }
    assert all("over patients" in value["method"] for value in found.values() if "method" in value)
    assert found["sensitivity"]["a"]["method"] == "Wilson of effective n over patients"
    assert ends(interval("mcc", of, clusters)) == pytest.approx((found["mcc"]["low"], found["mcc"]["high"]), abs=1e-6)


def test_patients_widen_intervals() -> None:
    of, _ = draw(np.random.default_rng(10), 60)
    copies, patients = of.select(np.tile(np.arange(60), 4)), np.tile(np.arange(60), 4)
    for name in ("mcc", "auroc", "brier"):
        alone, apart, together = (ends(interval(name, *given)) for given in ((of,), (copies,), (copies, patients)))
        assert np.ptp(apart) < 0.6 * np.ptp(alone)
        assert np.ptp(together) == pytest.approx(np.ptp(alone), rel=0.15)


def test_of_one_seed_the_interval_is_that_of_its_run() -> None:
    of, _ = draw(np.random.default_rng(11), 50)
    assert interval_over_seeds("mcc", [of]) == interval("mcc", of)
    assert interval_over_seeds("mcc", [of, of]) is not None
    perfect = Predicted(of.labels, np.eye(3)[of.labels], of.classes)
    assert interval_over_seeds("mcc", [perfect, perfect]) is None


def test_the_spread_over_seeds_by_hand() -> None:
    rng = np.random.default_rng(13)
    shared, own = rng.normal(size=4000), rng.normal(size=(4, 4000))
    estimates = np.array([1.0, 2.0, 3.0, 4.0])
    replicates = [
        Replicates(value, np.zeros(1), value + 3 * shared + 2 * part)
        for value, part in zip(estimates, own, strict=True)
    ]
    found = spread_over_seeds(replicates, clusters=50)
    assert found and found.seeds == pytest.approx(np.var(estimates, ddof=1) / 4)
    assert found.samples == pytest.approx(9, rel=0.05), (
        "what seeds do not share, 4 / 4, is in the variance between them"
    )
    wide = np.sqrt(student.ppf(0.975, 3) ** 2 * found.seeds + student.ppf(0.975, 49) ** 2 * found.samples)
    assert found.reach(0.95) == pytest.approx(wide) and found.p_value(wide) == pytest.approx(0.05)
    assert found.p_value(0.0) == pytest.approx(1, abs=1e-6) and 0 < found.p_value(1e9) < 1e-8


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(12)
    of, _ = draw(rng, 200)
    alike = [Predicted(of.labels, of.logits + rng.normal(scale=0.1, size=of.logits.shape), CLASSES) for _ in range(4)]
    good = of.logits + 8 * np.eye(3)[of.labels] * (rng.random(200) < 0.5)[:, None]
    apart = [*alike[:2], Predicted(of.labels, good, CLASSES), Predicted(of.labels, good, CLASSES)]
    narrow, wide = ends(interval_over_seeds("accuracy", alike)), ends(interval_over_seeds("accuracy", apart))
    assert np.ptp(narrow) < 0.2 and np.ptp(wide) > 1.7 * np.ptp(narrow)
