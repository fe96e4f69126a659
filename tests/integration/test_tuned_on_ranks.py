"""Real processes: a tuned recipe on two ranks, killed as it trains its second candidate, ends as in one process."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import RUN, assert_same_run, environment, launch, run_directory, torchrun, write_config
from vipbench.harness.config.overrides import override
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json

pytestmark = pytest.mark.integration


def test_two_ranks_choose_as_one_process_does(vip_config: dict[str, Any], tmp_path: Path) -> None:
    train = {key: value for key, value in vip_config["train"].items() if key != "lr"} | {"epochs": 15, "select": "last"}
    config = {**vip_config, "train": train, "recipe": "tuned", "grid": {"lr": [1e-6, 0.02]}}
    config["run"] = {**vip_config["run"], "checkpoint_steps": 5, "micro_batch": None}
    write_config(config, tmp_path)
    command = [*torchrun(2), *RUN, "config.yaml"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/*.partial/candidates/2/checkpoints/*.json")):
        assert running.poll() is None and time.monotonic() < deadline, "it should be training"
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, screen = running.communicate(timeout=60)
    assert "SIGTERM: the run stops here; the same command goes on" in screen
    again = launch(command, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("training goes on after step") == 2, "the second candidate, and the chosen one at its end"
    alone = execute(resolve_config(override(config, [f"run.out={tmp_path / 'alone'}"])))
    assert_same_run(run_directory(tmp_path), alone)
    record, expected = (read_json(path / "tuning.json") for path in (run_directory(tmp_path), alone))
    assert [record["chosen"], record["grid"]] == [expected["chosen"], expected["grid"]]
    for one, other in zip(record["candidates"], expected["candidates"], strict=True):
        assert one["accuracy"] == other["accuracy"] and one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    cost = read_json(run_directory(tmp_path) / "provenance.json")["cost"]
    assert cost["train_seconds"] > 0 and cost["peak_gib"] > 0.1
