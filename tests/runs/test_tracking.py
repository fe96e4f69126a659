"""Trackers are told what a run writes; one that is missing is named before anything is trained."""

from pathlib import Path
from typing import Any

import pytest

from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError
from vipbench.harness.runs import tracking
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json


def run(base: dict[str, Any], out: Path, *overrides: str) -> Path:
    return execute(resolve_config(override(base, [f"run.out={out}", *overrides])))


def test_tensorboard_gets_rates_losses_accuracies_and_metrics(base_config: dict[str, Any], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = run(base_config, tmp_path, "run.tracking=[tensorboard]", "train.select=best")
    events = accumulator.EventAccumulator(str(path / "tracking")).Reload()
    values = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert values["lr"] == [(3, pytest.approx(1e-5)), (6, pytest.approx(0.05)), (9, pytest.approx(0.0375))]
    assert [step for step, _ in values["loss"]] == [step for step, _ in values["validation_accuracy"]] == [3, 6, 9]
    accuracy = read_json(path / "metrics.json")["accuracy"]
    assert values["test/accuracy"] == [(9, pytest.approx(accuracy))]


def test_tracking_is_no_part_of_a_runs_identity(base_config: dict[str, Any]) -> None:
    configs = [resolve_config(override(base_config, [f"run.tracking={value}"])) for value in ("[]", "[wandb]")]
    assert len({run_name(config, Digests("data", "backbone", None)) for config in configs}) == 1


def test_a_tracker_that_is_not_installed(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match=r"run.tracking: wandb is not installed here; pip install wandb"):
        run(base_config, tmp_path, "run.tracking=[wandb]")
    (partial,) = tmp_path.glob("*.partial")
    assert not (partial / "steps.jsonl").exists()
