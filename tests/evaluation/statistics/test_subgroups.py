"""Subgroups: every one is there, with the interval that its samples alone would have."""

import numpy as np
import pytest

from tests.evaluation.statistics.drawn import CLASSES, draw
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.intervals import interval
from vipbench.harness.evaluation.statistics.subgroups import UNKNOWN, subgroups


def test_groups_have_values_intervals_and_the_worst_is_named() -> None:
    of, clusters = draw(np.random.default_rng(1), 150, images=2)
    sex = [None if patient % 10 == 0 else "mf"[patient % 2] for patient in clusters]
    for metric in ("accuracy", "auroc", "ece"):
        found = subgroups(metric, of, sex, clusters)
        assert found and [group.name for group in found.groups] == ["f", "m", UNKNOWN]
        assert sum(group.samples for group in found.groups) == len(of.labels)
        assert sum(group.clusters for group in found.groups) == 150
        mask = np.array([name == "m" for name in sex])
        men = found.groups[1]
        assert men.interval == interval(metric, of.select(mask), clusters[mask]) and men.interval
        values = [group.value or 0 for group in found.groups]
        worst = max(values) if metric == "ece" else min(values)
        assert found.worst and found.worst.value == worst
        assert found.gap is not None and found.gap == pytest.approx(max(values) - min(values)) and found.gap_interval
        assert found.gap_interval.low <= found.gap <= found.gap_interval.high


def test_a_gap_that_chance_explains_reaches_zero_and_a_real_one_does_not() -> None:
    of, _ = draw(np.random.default_rng(2), 400)
    halves = np.where(np.arange(400) < 200, "a", "b")
    alike = subgroups("accuracy", of, halves)
    helped = of.logits + 3 * np.eye(3)[of.labels] * (halves == "b")[:, None]
    apart = subgroups("accuracy", Predicted(of.labels, helped, CLASSES), halves)
    assert alike and alike.gap_interval and alike.gap_interval.low == 0
    assert apart and apart.gap_interval and apart.gap_interval.low > 0.1
    assert apart.worst and apart.worst.name == "a"


def test_one_group_has_no_gap_and_an_undefined_value_no_number() -> None:
    of, _ = draw(np.random.default_rng(3), 40)
    alone = subgroups("accuracy", of, ["x"] * 40)
    assert alone and alone.gap is None and alone.worst is None and alone.groups[0].value is not None
    by_class = subgroups("auroc", of, [CLASSES[label] for label in of.labels])
    assert by_class and [group.value for group in by_class.groups] == [None] * 3 and by_class.gap is None
    assert subgroups("samples", of, ["x"] * 40) is None
