"""Warnings of thin evidence name what is thin."""

from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.evaluation.statistics.warnings import few_clusters, few_samples, one_seed, overlapping


def test_each_warning_is_there_where_evidence_is_thin_only() -> None:
    assert few_samples({"a": 50, "b": 49, "c": 3}) == ["fewer than 50 test samples of b (49), c (3)"]
    assert few_samples({"a": 50}) == []
    assert one_seed(1) and not one_seed(2)
    assert few_clusters(30) == [] and "12 patients only" in few_clusters(12)[0] and "unknown" in few_clusters(None)[0]


def test_overlapping_intervals_are_named() -> None:
    own = {
        "vip": Interval(0.7, 0.8, "Wilson"),
        "coop": Interval(0.65, 0.7, "Wilson"),
        "zero_shot": Interval(0.1, 0.2, "Wilson"),
    }
    assert overlapping("vip", own) == ["the interval of vip overlaps with coop: compare them in pairs"]
    assert overlapping("zero_shot", own) == []
    assert "coop" in overlapping("vip", {"vip": own["vip"], "coop": None})[0]
