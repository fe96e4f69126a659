"""A method outside the clone in processes of their own: a run, and a sweep that goes on from it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.methods.documented import write_plugin
from vipbench.harness.cli import app
from vipbench.harness.runs.collect import read_runs
from vipbench.sweeps.status import sweep_status

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_a_run_and_a_sweep_share_a_plugin(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_plugin(tmp_path)
    base = {**base_config, "method": "my_kgcoop", "train": {"epochs": 2, "batch_size": 6, "lr": 0.05}}
    Path("config.yaml").write_text(yaml.safe_dump(base))
    Path("grid.yaml").write_text(yaml.safe_dump({"base": "config.yaml", "axes": {"seed": [1, 2]}}))
    alone = [sys.executable, str(ROOT / "harness" / "run.py"), "config.yaml", "run.out=out/runs"]
    subprocess.run([*alone, "--plugin", "my_kgcoop.py"], check=True)
    sweep = ["sweep", "run", "grid.yaml", "--out", "out", "--plugin", "my_kgcoop.py"]
    result = CliRunner().invoke(app, sweep)
    assert result.exit_code == 0, result.output
    assert [state.state for state in sweep_status(Path("out"))] == ["done", "done"]
    assert len(list(Path("out/logs").iterdir())) == 1, "the run that was there is one of the sweep's"
    assert read_runs(Path("out/runs"))["seed"].tolist() == [1, 2]
