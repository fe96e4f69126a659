"""A sweep of real processes: failures are recorded, what is finished is not run again, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import UserError
from sweeps.runner import run_sweep, sweep_status

pytestmark = pytest.mark.integration


@pytest.fixture
def grid(base_config: dict[str, Any], tmp_path: Path) -> Path:
    """Two runs that work, and one whose learning rate makes its loss infinite."""
    axes = {"method": ["zero_shot", "coop"], "train.lr": [0.01, 1e30]}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": {**base_config, "train": {"epochs": 4, "warmup_lr": 0.01}}, "axes": axes}))
    return path


def test_a_failed_run_is_recorded_and_the_rest_go_on(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", "run", str(grid), "--out", str(out), "--jobs", "2"])
    assert result.exit_code == 1
    assert [state.state for state in sweep_status(out)] == ["done", "done", "failed"]
    failed = sweep_status(out)[2]
    assert "error: training: the loss is" in failed.reason
    record = json.loads((out / "failed" / f"{failed.name}.json").read_text())
    assert record["exit_status"] == 2
    assert Path(record["log"]).is_file()
    table = CliRunner().invoke(app, ["table", str(out), "--columns", "shots"])
    assert table.exit_code == 0
    assert "coop" in table.output

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}
    assert len(stamps) == 2
    states = run_sweep(grid, out, 1, ["train.warmup_epochs=1"])
    assert [state.state for state in states] == ["done", "done", "failed"]
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}, (
        "finished runs ran again"
    )


def test_status_needs_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep here"):
        sweep_status(tmp_path)


def test_sigterm_ends_the_runs_too(base_config: dict[str, Any], tmp_path: Path) -> None:
    slow = {**base_config, "method": "coop", "train": {"epochs": 100000, "batch_size": 5}}
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump({"base": slow, "axes": {"seed": [1, 2]}}))
    command = [str(Path(sys.executable).parent / "vipbench"), "sweep", "run", str(grid), "--out", str(out)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as sweep:
        deadline = time.monotonic() + 120
        while not list(out.glob("runs/*.partial/steps.jsonl")):
            assert sweep.poll() is None, sweep.stderr.read().decode() if sweep.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [state.state for state in sweep_status(out)] == ["running", "pending"]
        sweep.send_signal(signal.SIGTERM)
        sweep.wait(timeout=60)
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert [state.state for state in sweep_status(out)] == ["pending", "pending"]
