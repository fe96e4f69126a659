"""A real Slurm cluster on this machine: arrays, several ranks and nodes, requeueing, failures, a submitter that dies."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.integration.launching import PYTHON, SCRIPTS, assert_same_run, run
from vipbench.harness.cli import app
from vipbench.harness.system.files import read_json
from vipbench.sweeps.executors.submissions import slurm
from vipbench.sweeps.status import RunState, sweep_status

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("slurm_cluster")]

PROFILE = {"gpus_per_run": 0, "cpus_per_run": 1, "time": "10:00", "seconds_to_save": 60}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    return tmp_path / "profile.yaml"


@pytest.fixture(scope="module")
def long_config(base_config: dict[str, Any]) -> dict[str, Any]:
    """Some ten seconds of short steps."""
    train = {"epochs": 600, "batch_size": 5, "lr": 0.02, "views": 2}
    return {**base_config, "method": "coop", "train": train, "run": {**base_config["run"], "log_every": 1}}


def write_grid(folder: Path, base: dict[str, Any], **parts: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": base, **parts}))
    return path


def sweep(*words: object, status: int = 0) -> str:
    """Run `vipbench sweep WORDS`; returns its output."""
    result = CliRunner().invoke(app, ["sweep", *map(str, words)])
    assert result.exit_code == status, result.output
    return result.output


def wait_for(condition: Callable[[], Any], out: Path, seconds: float = 150.0) -> None:
    """Wait until a condition holds; where it does not in time, show what is known of the sweep."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [path for path in out.rglob("*") if path.suffix in (".log", ".err") and path.stat().st_size]
            shown = [f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs]
            pytest.fail("\n".join([str(sweep_status(out)), slurm("squeue"), *shown]))
        time.sleep(0.5)


def ended(out: Path) -> bool:
    return not any(state.queued for state in sweep_status(out))


def only(states: list[RunState]) -> RunState:
    (state,) = states
    return state


def steps(out: Path, name: str) -> int:
    log = out / "runs" / f"{name}.partial" / "steps.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def test_six_runs_as_an_array_whose_submitter_is_killed(
    base_config: dict[str, Any], profile: Path, tmp_path: Path
) -> None:
    base = {**base_config, "method": "coop", "train": {**base_config["train"], "warmup_lr": 0.01}}
    grid = write_grid(tmp_path, base, axes={"seed": [1, 2, 3, 4, 5]}, include=[{"train.lr": 1e30, "train.epochs": 4}])
    out = tmp_path / "out"
    command = ["sweep", "run", str(grid), "--out", str(out), "--executor", "slurm", "--profile", str(profile)]
    submitter = subprocess.Popen([str(SCRIPTS / "vipbench"), *command, "--max-parallel", "2", "--wait"])
    wait_for(lambda: len([path for path in out.glob("jobs/*.json") if read_json(path)["job"]]) == 2, tmp_path)
    submitter.send_signal(signal.SIGKILL)
    submitter.wait()

    assert "6 pending" in sweep("status", out)
    sweep(*command[1:])
    assert len(list(out.glob("jobs/*.json"))) == 2, "what waits already was submitted again"

    wait_for(lambda: ended(out), out)
    states = sweep_status(out)
    assert [state.state for state in states] == ["done"] * 5 + ["failed"]
    assert "training: the loss is" in states[5].reason
    assert f"failed   {states[5].name}  {states[5].reason}" in sweep("status", out)
    assert "encode views" in (out / "logs" / "bank.log").read_text()
    logs = [(out / "logs" / f"{state.name}.log").read_text() for state in states]
    assert not any("encode" in log for log in logs), "a run filled what the first job should have filled"
    array = next(path for path in out.glob("jobs/*/*_submission.sh") if "--array" in path.read_text())
    assert "#SBATCH --array=0-5%2" in array.read_text()
    bank = next(record for record in map(read_json, out.glob("jobs/*.json")) if record["units"] == [[]])
    assert f"#SBATCH --dependency=afterany:{bank['job']}" in array.read_text(), "the runs wait for the bank"
    config = yaml.safe_load((out / "configs" / f"{states[0].name}.yaml").read_text())
    config["run"]["out"] = "runs"
    assert_same_run(out / "runs" / states[0].name, run(PYTHON, config, tmp_path / "alone"))

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}
    sweep("retry", out, "--failed")
    assert len(list(out.glob("jobs/*.json"))) == 3
    wait_for(lambda: ended(out), out)
    assert "training: the loss is" in sweep_status(out)[5].reason
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.json")}


def test_a_run_of_two_ranks(vip_config: dict[str, Any], vip_run: Path, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--executor", "slurm", "--profile", profile, "--processes-per-run", 2, "--cpus-per-run", 2]
    sweep("run", write_grid(tmp_path, vip_config, include=[{}]), "--out", out, *options)
    wait_for(lambda: ended(out), out)
    path = out / "runs" / only(sweep_status(out)).name
    assert_same_run(path, vip_run)
    assert sorted(log.name for log in (path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.parametrize(("number", "nodes"), [("TERM", 1), ("USR2", 2)])  # USR2: Slurm sends it before time is up
def test_a_job_that_is_told_to_end_goes_back_into_the_queue_and_goes_on(
    long_config: dict[str, Any], profile: Path, tmp_path: Path, number: str, nodes: int
) -> None:
    """A process on each node."""
    out = tmp_path / "out"
    options = ["--executor", "slurm", "--profile", profile, "--nodes-per-run", nodes, "--cpus-per-run", nodes]
    sweep("run", write_grid(tmp_path, long_config, include=[{}]), "--out", out, *options)
    name = only(sweep_status(out)).name
    wait_for(lambda: steps(out, name) > 30, out)
    state = only(sweep_status(out))
    assert state.state == "running" and " of 1800, about " in state.reason, state
    (record,) = out.glob("jobs/*.json")
    slurm("scancel", f"--signal={number}", read_json(record)["job"])
    wait_for(lambda: only(sweep_status(out)).state == "pending", out)
    wait_for(lambda: ended(out), out)
    assert only(sweep_status(out)).state == "done", sweep_status(out)
    provenance = read_json(out / "runs" / name / "provenance.json")
    assert provenance["resumed_after_step"] > 0
    assert provenance["hardware"]["processes"] == nodes
    if nodes == 1:
        whole = run(PYTHON, long_config, tmp_path / "whole")
        prompts, expected = (load_file(path / "prompts.safetensors") for path in (out / "runs" / name, whole))
        assert all(prompts[key].equal(tensor) for key, tensor in expected.items())


def test_a_run_that_is_preempted_goes_on(long_config: dict[str, Any], profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(
        "run",
        write_grid(tmp_path, long_config, include=[{}]),
        "--out",
        out,
        "--executor",
        "slurm",
        "--profile",
        profile,
    )
    name = only(sweep_status(out)).name
    wait_for(lambda: steps(out, name) > 30, out)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3"]
    slurm("sbatch", "--job-name=urgent", f"--output={tmp_path / 'urgent.log'}", *urgent)
    wait_for(lambda: only(sweep_status(out)).state == "pending", out)
    wait_for(lambda: ended(out), out)
    assert only(sweep_status(out)).state == "done", sweep_status(out)
    assert read_json(out / "runs" / name / "provenance.json")["resumed_after_step"] > 0


def test_cancelled_jobs_stop_at_a_checkpoint(long_config: dict[str, Any], profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    endless = {**long_config, "train": {**long_config["train"], "epochs": 10**6}}
    grid = write_grid(tmp_path, endless, axes={"seed": [1, 2]})
    sweep("run", grid, "--out", out, "--executor", "slurm", "--profile", profile, "--max-parallel", 1)
    wait_for(lambda: any(state.state == "running" and state.reason for state in sweep_status(out)), out)
    assert sorted(state.state for state in sweep_status(out)) == ["pending", "running"]
    assert "2 jobs cancelled" in sweep("cancel", out)
    wait_for(lambda: ended(out), out)
    assert [state[1:3] for state in sweep_status(out)] == [("pending", "cancelled")] * 2
    assert list(out.glob("runs/*.partial/checkpoints/*.json")), "the one that ran has left a checkpoint"
    assert subprocess.run(["pgrep", "-f", str(out)], capture_output=True, check=False).stdout == b""


def test_a_run_that_is_killed_is_said_to_be(long_config: dict[str, Any], profile: Path, tmp_path: Path) -> None:
    """By the kernel for its memory, say: nothing of ours has time to record anything but Slurm's job."""
    out = tmp_path / "out"
    grid = write_grid(tmp_path, long_config, include=[{}])
    sweep("run", grid, "--out", out, "--executor", "slurm", "--profile", profile)
    name = only(sweep_status(out)).name
    wait_for(lambda: steps(out, name) > 5, out)
    subprocess.run(["pkill", "-KILL", "-f", f"{sys.executable} .*harness/run.py .*{name}"], check=True)
    wait_for(lambda: ended(out), out)
    state = only(sweep_status(out))
    assert state.state == "failed" and state.reason.startswith("killed by SIGKILL; it said last: "), state
