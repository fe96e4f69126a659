"""Simulation where the truth is known: 95% intervals hold it in 93 to 97% of 1,000 draws, and tests reject in about 5%."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from tests.evaluation.statistics.drawn import draw, pair, truth
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics import comparisons
from vipbench.harness.evaluation.statistics.comparisons import compare, compare_over_seeds, sign_flip_test
from vipbench.harness.evaluation.statistics.conformal import SCORES, conformal_sets, halves
from vipbench.harness.evaluation.statistics.intervals import Interval, interval_over_seeds, intervals
from vipbench.harness.evaluation.statistics.subgroups import subgroups

DRAWS = 1000


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "RESAMPLES", 1000)


def each(of: Predicted, clusters: np.ndarray, seed: int) -> Iterator[tuple[str, Interval]]:
    """All intervals by name, those of classes as "sensitivity[a]"."""
    for name, value in intervals(of, clusters, seed).items():
        if isinstance(value, dict):
            yield from ((f"{name}[{label}]", own) for label, own in value.items() if own)
        elif value:
            yield name, value


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "patients", "images"), [(3, 500, 1), (3, 300, 4), (2, 400, 1)])
def test_intervals_hold_the_truth(classes: int, patients: int, images: int) -> None:
    rng, known = np.random.default_rng(classes + images), truth(classes, images)
    held = defaultdict(list)
    for seed in range(DRAWS):
        of, clusters = draw(rng, patients, classes, images)
        for name, own in each(of, clusters, seed):
            held[name].append(own.low <= known[name] <= own.high)
    shares = {name: float(np.mean(values)) for name, values in held.items()}
    assert len(shares) == 12 + 2 * classes and all(len(values) == DRAWS for values in held.values())
    assert not {name: share for name, share in shares.items() if not 0.93 <= share <= 0.97}


def with_seeds(rng: np.random.Generator, samples: int, seeds: int, spread: float) -> list[Predicted]:
    """Runs whose accuracies vary with the seed, on the same samples."""
    labels, shared = rng.integers(0, 2, samples), rng.normal(size=(samples, 2))
    runs = []
    for signal in 1 + spread * rng.normal(size=seeds):
        logits = 0.7 * shared + 0.7 * rng.normal(size=(samples, 2)) + signal * np.eye(2)[labels]
        runs.append(Predicted(labels, logits.astype(np.float32), ["a", "b"]))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.3), (5, 0.1), (10, 0.0)])
def test_intervals_over_seeds_hold_the_truth_of_all_seeds(seeds: int, spread: float) -> None:
    rng = np.random.default_rng(seeds)
    large = with_seeds(np.random.default_rng(0), 2000, 1000, spread)
    known = np.mean([np.mean(of.predicted == of.labels) for of in large])
    held = []
    for seed in range(DRAWS):
        found = interval_over_seeds("accuracy", with_seeds(rng, 200, seeds, spread), seed=seed)
        assert found
        held.append(found.low <= known <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("images", [1, 4])
def test_the_exact_test_keeps_its_level(images: int) -> None:
    rng, rejected = np.random.default_rng(7), []
    for _ in range(DRAWS):
        first, second, clusters = pair(rng, 200, images=images)
        won = (first.predicted == first.labels).astype(int) - (second.predicted == second.labels)
        rejected.append(sign_flip_test(won, clusters) < 0.05)
    assert 0.02 <= np.mean(rejected) <= 0.065, "exact tests of whole numbers reject a little less"


@pytest.mark.parametrize("images", [1, 4])
def test_delong_keeps_its_level(images: int) -> None:
    rng, rejected = np.random.default_rng(7), []
    for _ in range(DRAWS):
        first, second, clusters = pair(rng, 200, 2, images)
        found = compare("auroc", first, second, clusters)
        assert found and found.p is not None
        rejected.append(found.p < 0.05)
    assert 0.03 <= np.mean(rejected) <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "images"), [("macro_f1", 4), ("auroc", 1)])
def test_the_paired_bootstrap_keeps_its_level(metric: str, images: int) -> None:
    rng, rejected = np.random.default_rng(7), []
    for seed in range(DRAWS):
        first, second, clusters = pair(rng, 200, 3, images)
        found = compare(metric, first, second, clusters, seed)
        assert found and found.p is not None
        rejected.append(found.p < 0.05)
    assert 0.03 <= np.mean(rejected) <= 0.07


@pytest.mark.slow
def test_comparisons_over_seeds_keep_their_level() -> None:
    rng = np.random.default_rng(8)
    rejected = []
    for seed in range(DRAWS):
        runs = with_seeds(rng, 150, 8, 0.3)
        found = compare_over_seeds("accuracy", runs[:4], runs[4:], seed=seed)
        assert found and found.p is not None
        rejected.append(found.p < 0.05)
    assert 0.03 <= np.mean(rejected) <= 0.07


@pytest.mark.slow
def test_gaps_between_subgroups_hold_the_truth() -> None:
    rng = np.random.default_rng(9)
    signals = {"f": 1.6, "m": 0.9, "other": 1.2}
    known = [
        np.mean((of := draw(rng, 200_000, signal=signal)[0]).predicted == of.labels) for signal in signals.values()
    ]
    held = []
    for seed in range(DRAWS):
        parts = [draw(rng, 200, images=2, signal=signal) for signal in signals.values()]
        labels, logits = (np.concatenate([getattr(of, name) for of, _ in parts]) for name in ("labels", "logits"))
        clusters = np.concatenate([1000 * place + own for place, (_, own) in enumerate(parts)])
        named = np.repeat(list(signals), [len(own) for _, own in parts])
        found = subgroups("accuracy", Predicted(labels, logits, ["a", "b", "c"]), named, clusters, seed)
        assert found and found.gap_interval
        held.append(found.gap_interval.low <= max(known) - min(known) <= found.gap_interval.high)
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("score", sorted(SCORES))
def test_conformal_sets_hold_labels_as_often_as_they_should(score: str) -> None:
    rng = np.random.default_rng(10)
    shares = []
    for seed in range(DRAWS):
        of, _ = draw(rng, 200, scale=0.8)
        calibration, test = halves(200, seed=seed)
        shares.append(conformal_sets(score, of.select(calibration), of.select(test), seed=seed).coverage)
    assert 0.9 - 0.004 <= np.mean(shares) <= 0.9 + 1 / 101 + 0.004, "100 samples calibrate"
