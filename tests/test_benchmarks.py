"""Benchmarks compare what runs on one device, and compute the same on both sides."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep, symptom_client, tower_step, training_step
from tests.conftest import TEXT, VIT
from tests.pretended_gpu import pretended_gpu
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import Backbone, load_backbone


def small(model_folder: Path, devices: list[Any]) -> Callable[..., Backbone]:
    """A small backbone in the place of ViT-B-16; remembers on which devices it was wanted."""

    def load(config: BackboneConfig, device: Any = "cpu") -> Backbone:
        devices.append(device)
        return load_backbone(BackboneConfig(name=str(model_folder / "vit.json")), device)

    return load


def test_a_training_step_is_compared_on_a_gpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark itself asserts that both paths give the same logits."""
    devices: list[Any] = []
    monkeypatch.setattr(training_step, "load_backbone", small(model_folder, devices))
    monkeypatch.setattr(training_step, "STEPS", 1)
    monkeypatch.setattr(training_step, "matrix_peak", lambda *arguments: 1e12)
    monkeypatch.setattr(training_step, "count_flops", lambda run: 1)
    with pretended_gpu():
        result = training_step.measure()
    assert devices == ["cuda"]
    assert [row["method"] for row in result.rows] == ["coop", "vip", "cocoop"]


def test_a_step_inside_the_towers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each method that takes images; the benchmark itself asserts that both sides give the same logits."""
    path = tmp_path / "deep.json"  # as many blocks as the methods have prompts for
    architecture = {"embed_dim": 32, "vision_cfg": {**VIT, "layers": 12}, "text_cfg": {**TEXT, "layers": 12}}
    path.write_text(json.dumps(architecture))
    monkeypatch.setattr(tower_step, "MODEL", str(path))
    monkeypatch.setattr(tower_step, "ROUNDS", 1)
    monkeypatch.setattr(tower_step, "BATCH", 2)
    result = tower_step.measure()
    names = [name for name in method_names() if method_class(name).needs == "images"]
    assert [row["method"] for row in result.rows] == [name for name in names for _ in tower_step.COUNTS]
    assert not result.notes


@pytest.mark.parametrize("method", sweep.METHODS)
def test_the_plain_sweep_runs_where_ours_does(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    devices: list[Any] = []
    monkeypatch.setattr(sweep, "load_backbone", small(model_folder, devices))
    monkeypatch.setattr(sweep, "PER_CLASS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(sweep, "EPOCHS_MEASURED", 1)
    data = sweep.make_dataset(tmp_path)
    with pretended_gpu():
        assert sweep._plain_seconds(method, data) > 0
    assert devices == ["cuda"]


def test_the_symptom_client_is_compared_with_bare_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both servers; the client asserts that all requests are answered, the servers' errors end the generators."""
    monkeypatch.setattr(symptom_client, "TURNS", dict.fromkeys(symptom_client.TURNS, 1))
    monkeypatch.setattr(symptom_client, "CLASSES", 100)
    result = symptom_client.measure()
    assert [row["server"] for row in result.rows] == [name for name in symptom_client.SERVERS for _ in range(3)]
    for row in result.rows:
        assert row["requests_per_s"] > 0 and row["cpu_us"] > 0
        assert (row["ours_over_it"] == row["ours_over_it_by_cpu"] == 1) == (row["generator"] == "ours")
    assert len(result.notes) == 2
