"""The executor that runs units in this process: one that fails, for whatever reason, does not end the others."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from vipbench.harness.config.schema import Config
from vipbench.harness.errors import UserError
from vipbench.harness.runs import execute
from vipbench.harness.system.signals import Stopped
from vipbench.sweeps.executors.in_process import InProcessExecutor
from vipbench.sweeps.runner import LAUNCH, retry, run_sweep
from vipbench.sweeps.units import CONFIGS, FAILED, LOGS, unit


@pytest.fixture
def grid(base_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    base = base_config | {"method": {"name": "coop", "context_length": 2}}
    base["train"] = {"epochs": 1, "warmup_epochs": 0, "batch_size": 5}
    path.write_text(yaml.safe_dump({"base": base, "axes": {"method": ["zero_shot", "coop"], "seed": [1, 2, 3, 4]}}))
    return path


def test_runs_are_those_of_any_executor(grid: Path, tmp_path: Path) -> None:
    out, overrides = tmp_path / "out", list[str]()
    for pack in (False, True):
        states = run_sweep(grid, out / str(pack), InProcessExecutor(), overrides, pack=pack)
        assert [state.state for state in states] == ["done"] * 5
    names = [{path.parent.name for path in (out / pack / "runs").glob("*/metrics.json")} for pack in ("False", "True")]
    assert names[0] == names[1] and len(names[0]) == 5


def test_a_failure_is_recorded_and_the_rest_go_on(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = execute.execute, tmp_path / "out"

    def failing(config: Config, force: bool = False) -> Path:
        if config.seed == 2:
            raise UserError("no luck today")
        if config.seed == 3:
            raise RuntimeError("out of\nmemory")
        return whole(config, force)

    monkeypatch.setattr(execute, "execute", failing)
    with caplog.at_level(logging.ERROR):
        states = run_sweep(grid, out, InProcessExecutor())
    assert [state.state for state in states] == ["done", "done", "failed", "failed", "done"]
    assert [state.reason for state in states[2:4]] == ["no luck today", "RuntimeError: out of memory"]
    record = json.loads((out / FAILED / f"{states[3].name}.json").read_text())
    assert "out of" in Path(record["log"]).read_text() and "Traceback" in Path(record["log"]).read_text()
    assert json.loads((out / LAUNCH).read_text())["executor"] == {"kind": "in_process"}
    monkeypatch.undo()
    assert [state.state for state in retry(out, only_failed=True)] == ["done"] * 5


def test_a_config_that_cannot_be_read_fails_its_run(tmp_path: Path) -> None:
    for folder in (CONFIGS, FAILED, LOGS):
        (tmp_path / folder).mkdir()
    InProcessExecutor().run(tmp_path, [unit(tmp_path, ["one"]), unit(tmp_path, ["two"])])
    errors = [json.loads((tmp_path / FAILED / f"{name}.json").read_text())["error"] for name in ("one", "two")]
    assert all(f"{name}.yaml" in error for name, error in zip(("one", "two"), errors, strict=True))


def test_a_signal_ends_the_sweep(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(config: Config, force: bool = False) -> Path:
        raise Stopped(143)

    monkeypatch.setattr(execute, "execute", stopped)
    with pytest.raises(Stopped):
        run_sweep(grid, tmp_path / "out", InProcessExecutor())
    assert not list((tmp_path / "out" / FAILED).iterdir())
