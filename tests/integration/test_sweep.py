"""A sweep of real processes: failures are recorded, what is finished is not run again, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.runs.collect import read_runs
from vipbench.sweeps.executors.local import LocalExecutor
from vipbench.sweeps.runner import run_sweep
from vipbench.sweeps.status import sweep_status

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@contextmanager
def started(command: list[str], start_new_session: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """A process that does not outlive a failing test."""
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def wait_for(process: "subprocess.Popen[str]", folder: Path, *patterns: str) -> None:
    """Wait until files that match every pattern are in a folder."""
    deadline = time.monotonic() + 120
    while not all(list(folder.glob(pattern)) for pattern in patterns):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(folder: Path) -> str:
    """The processes whose command names a folder."""
    return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout


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
    assert "training: the loss is" in failed.reason
    record = json.loads((out / "failed" / f"{failed.name}.json").read_text())
    assert record["exit_status"] == 2
    assert Path(record["log"]).is_file()
    table = CliRunner().invoke(app, ["table", str(out), "--columns", "shots"])
    assert table.exit_code == 0
    assert "coop" in table.output

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}
    assert len(stamps) == 2
    states = run_sweep(grid, out, LocalExecutor(), ["train.warmup_epochs=1"])
    assert [state.state for state in states] == ["done", "done", "failed"]
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}, (
        "finished runs ran again"
    )


def test_packed_runs_are_the_runs(base_config: dict[str, Any], tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    base = {**base_config, "method": "coop", "train": {**base_config["train"], "epochs": 2}}
    axes = {"seed": [1, 2], "train.lr": [0.01, 1e30]}
    grid.write_text(yaml.safe_dump({"base": base, "axes": axes, "include": [{"method": "zero_shot", "train": None}]}))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", "run", str(grid), "--out", str(out), "--pack"])
    assert result.exit_code == 1
    states = sweep_status(out)
    assert [state.state for state in states] == ["done", "failed", "done", "failed", "done"]
    assert "training: the loss is" in states[1].reason
    assert len(list((out / "logs").iterdir())) == 2, "one process for four runs, one for the run that trains nothing"
    assert len(read_runs(out / "runs")) == 3


def test_status_needs_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep here"):
        sweep_status(tmp_path)


def endless(base: dict[str, Any], folder: Path, **parts: Any) -> Path:
    """A grid of runs that do not end by themselves, with loading processes."""
    run = {**base["run"], "bank": False, "workers": 1}  # a bank would first fill itself for all these epochs
    slow = {**base, "method": "coop", "train": {"epochs": 100000, "batch_size": 5}, "run": run}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": slow, "axes": {"seed": [1, 2]}, **parts}))
    return path


VIPBENCH = str(Path(sys.executable).parent / "vipbench")


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, []), (signal.SIGINT, []), (signal.SIGINT, ["--pack"])]
)
def test_an_end_ends_the_runs_too(
    base_config: dict[str, Any], tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    """At a checkpoint, which counts as no failure, also of a run whose loading processes are at work."""
    grid, out = endless(base_config, tmp_path), tmp_path / "out"
    with started([VIPBENCH, "sweep", "run", str(grid), "--out", str(out), *options]) as sweep:
        wait_for(sweep, out, "runs/*.partial/steps.jsonl")
        waiting = "running" if options else "pending"
        assert [state.state for state in sweep_status(out)] == ["running", waiting]
        sweep.send_signal(number)
        _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "interrupted" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert processes_of(out) == ""
    assert [state.state for state in sweep_status(out)] == ["pending", "pending"]
    assert list(out.glob("runs/*.partial/checkpoints/*.json"))


def test_runs_end_with_a_runner_that_is_killed_and_the_same_command_goes_on(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    grid, out = endless(base_config, tmp_path, include=[{"method": "zero_shot", "train": None}]), tmp_path / "out"
    command = [VIPBENCH, "sweep", "run", str(grid), "--out", str(out)]
    with started(command) as sweep:
        wait_for(sweep, out, "runs/*.partial/steps.jsonl")
        sweep.kill()
        sweep.communicate(timeout=10)
    (partial,) = out.glob("runs/*.partial")
    with started(command) as again:
        wait_for(again, out / "runs", f"{partial.name}/checkpoints/*.json", f"{partial.name}/steps.jsonl")
        log = out / "logs" / f"{partial.stem}.log"
        deadline = time.monotonic() + 120
        while "goes on after step" not in log.read_text():
            assert again.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert not list((out / "failed").iterdir()), "the run that the killed runner had left was started beside itself"
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=60)
    assert processes_of(out) == ""
    assert [state.state for state in sweep_status(out)] == ["pending"] * 3


@pytest.mark.parametrize(
    ("command", "when"), [("run.py", "early"), ("vipbench run", "early"), ("vipbench run", "while it trains")]
)
def test_ctrl_c_ends_a_run_in_one_line(base_config: dict[str, Any], tmp_path: Path, command: str, when: str) -> None:
    base = yaml.safe_load(endless(base_config, tmp_path).read_text())["base"]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**base, "run": {**base["run"], "out": str(tmp_path / "runs")}})
    )
    start = {"run.py": [sys.executable, str(ROOT / "harness" / "run.py")], "vipbench run": [VIPBENCH, "run"]}[command]
    with started([*start, str(tmp_path / "config.yaml")], start_new_session=True) as run:
        if when == "early":
            time.sleep(1.5)  # torch is being imported
        else:
            wait_for(run, tmp_path, "runs/*.partial/steps.jsonl")
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to the loading processes too
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    before = [line for line in said.splitlines() if not line.startswith(("train: ", "backbone "))]  # progress
    assert before == ["interrupted; the same command goes on from what is done"]
    assert not list(tmp_path.glob("runs/*.partial/failed.json"))
    assert processes_of(tmp_path) == ""


def test_a_signal_to_all_processes_of_a_run_is_no_failure(base_config: dict[str, Any], tmp_path: Path) -> None:
    """Send a signal as torchrun and Slurm do: the loading processes get it too, and the run still writes its checkpoint."""
    base = yaml.safe_load(endless(base_config, tmp_path).read_text())["base"]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**base, "run": {**base["run"], "out": str(tmp_path / "runs")}})
    )
    with started([sys.executable, str(ROOT / "harness" / "run.py"), str(tmp_path / "config.yaml")], True) as run:
        wait_for(run, tmp_path, "runs/*.partial/steps.jsonl")
        os.killpg(run.pid, signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert list(tmp_path.glob("runs/*.partial/checkpoints/*.json"))
    assert not list(tmp_path.glob("runs/*.partial/failed.json"))
    assert processes_of(tmp_path) == ""


STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1]])
open(sys.argv[1] + ("/run" if len(sys.argv) > 2 else "/child"), "w").close()
time.sleep(120)
"""
DRIVER = """
import signal, sys
from pathlib import Path
from vipbench.sweeps import units
from vipbench.sweeps.executors import local, processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
processes.SECONDS_TO_STOP = 1.0
folder = Path(sys.argv[1])
task = units.Unit(("stubborn",), (sys.executable, str(folder / "stubborn.py"), str(folder), "child"), folder / "log")
list(local.run_locally([task], jobs=1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stubborn_runs_and_their_children_are_ended(tmp_path: Path, number: signal.Signals) -> None:
    """Also when the person presses Ctrl-C again while we wait."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    with started([sys.executable, "-c", DRIVER, str(tmp_path)]) as driver:
        wait_for(driver, tmp_path, "run", "child")
        driver.send_signal(number)
        time.sleep(0.3)
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=30)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert processes_of(tmp_path) == ""
