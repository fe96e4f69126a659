"""Runs of a sweep shared by the processes that torchrun starts, on one node and on two."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.launching import SCRIPTS, environment, free_port
from vipbench.harness.system.files import read_json
from vipbench.sweeps.status import sweep_status

pytestmark = pytest.mark.integration


@contextmanager
def node(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """`vipbench sweep WORDS`, which is given on each node; it does not outlive a failing test."""
    process = subprocess.Popen(
        [str(SCRIPTS / "vipbench"), "sweep", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in a shell's background ignores
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def processes_of(folder: Path) -> str:
    return subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True, check=False).stdout


def workers(folder: Path) -> list[int]:
    """The processes of torchrun's that share a sweep."""
    found = subprocess.run(
        ["pgrep", "-f", f" -u -m vipbench.sweeps.executors.worker {folder}"], capture_output=True, check=True
    )
    return [int(number) for number in found.stdout.split()]


def on_two_nodes(*words: str) -> list[tuple[str, str]]:
    """Give the same command on two nodes, for a sweep of which one run fails; returns their outputs and errors."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(*words)) for _ in range(2)]
        said = [process.communicate(timeout=400) for process in nodes]
    assert [process.returncode for process in nodes] == [1, 1], said
    return said


def test_two_nodes_share_a_sweep(base_config: dict[str, Any], tmp_path: Path) -> None:
    base = {**base_config, "method": "coop", "train": {**base_config["train"], "warmup_lr": 0.01}}
    content = {"base": base, "axes": {"seed": [1, 2, 3]}, "include": [{"train.lr": 1e30, "train.epochs": 4}]}
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(content))
    place = f"127.0.0.1:{free_port()}"
    words = ["run", str(grid), "--out", str(out), "--executor", "torchrun", "--nnodes", "2", "--rdzv-endpoint", place]
    said = on_two_nodes(*words)
    assert all("3 done, 0 running, 0 pending, 1 failed" in output for output, _ in said), said
    states = sweep_status(out)
    assert [state.state for state in states] == ["done", "done", "done", "failed"]
    assert "training: the loss is" in states[3].reason
    takers = [line for _, errors in said for line in errors.splitlines() if line.startswith("process ")]
    assert all(sum(state.name in line for line in takers) == 1 for state in states), takers
    assert {rank for rank in (0, 1) for line in takers if f"process {rank}: " in line} == {0, 1}, takers
    hardware = [read_json(path)["hardware"] for path in out.glob("runs/*/provenance.json")]
    assert [(one["launcher"], one["processes"]) for one in hardware] == [("python", 1)] * 3

    said = on_two_nodes("retry", str(out), "--failed")
    takers = [line for _, errors in said for line in errors.splitlines() if line.startswith("process ")]
    assert len(takers) == 1 and states[3].name in takers[0], said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_end_ends_the_runs_too(base_config: dict[str, Any], tmp_path: Path, number: signal.Signals) -> None:
    """Also after one of the processes was killed, whose run and those of the others go on at a checkpoint."""
    run = {**base_config["run"], "bank": False}  # which would first fill itself for all these epochs
    endless = {**base_config, "method": "coop", "train": {"epochs": 100000, "batch_size": 5}, "run": run}
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump({"base": endless, "axes": {"seed": [1, 2]}}))
    with node("run", str(grid), "--out", str(out), "--executor", "torchrun", "--nproc-per-node", "2") as sweep:
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*.partial/steps.jsonl"))) < 2:
            assert sweep.poll() is None and time.monotonic() < deadline, sweep.communicate()
            time.sleep(0.1)
        if number == signal.SIGTERM:
            logs = list(out.glob("logs/*.log"))
            os.kill(min(workers(out)), signal.SIGKILL)
            while not all("goes on after step" in log.read_text() for log in logs):
                assert sweep.poll() is None and time.monotonic() < deadline + 60, [log.read_text() for log in logs]
                time.sleep(0.1)
        sweep.send_signal(number)
        _, said = sweep.communicate(timeout=90)
    if number == signal.SIGKILL:  # each process ends a moment after the one that started it
        while processes_of(out):
            assert time.monotonic() < deadline + 60, processes_of(out)
            time.sleep(0.5)
    else:
        assert sweep.returncode == 130
        assert "interrupted" in said.splitlines()[-1]
        assert "Traceback" not in said
    assert processes_of(out) == ""
    assert [state.state for state in sweep_status(out)] == ["pending", "pending"]
