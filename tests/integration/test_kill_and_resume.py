"""Real processes that are killed at random moments, many times over, or asked to end: the run that comes out is the same."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.launching import (
    PYTHON,
    RUN,
    assert_same_run,
    environment,
    forked,
    launch,
    run_in,
    torchrun,
    write_config,
)
from vipbench.harness.features.cache import list_banks
from vipbench.harness.system.files import read_json
from vipbench.harness.training.checkpoint import latest

pytestmark = pytest.mark.integration

DEATHS = 48


def work(folder: Path) -> None:
    """One run, in a process of its own, without its words."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    run_in(folder)


def process(folder: Path) -> Any:
    return forked(work, folder)


@pytest.fixture(scope="module")
def long_config(base_config: dict[str, Any]) -> dict[str, Any]:
    """A few hundred short steps, most of the time of a run."""
    train = {"epochs": 150, "batch_size": 5, "lr": 0.02, "views": 4, "optimizer": "adamw", "select": "best"}
    execution = {**base_config["run"], "log_every": 1, "checkpoint_steps": 7, "eval_batch_size": 8}
    return {**base_config, "method": {"name": "vip", "context_length": 2}, "train": train, "run": execution}


@pytest.fixture(scope="module")
def whole_run(long_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(long_config, folder)
    whole = process(folder)
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    return only_run(folder)


def only_run(folder: Path) -> Path:
    (path,) = (path for path in (folder / "runs").iterdir() if not path.name.startswith("."))
    return path


def assert_same_bits(path: Path, whole: Path) -> None:
    assert path.name == whole.name, "finished"
    prompts, expected = (load_file(run / "prompts.safetensors") for run in (path, whole))
    assert prompts.keys() == expected.keys()
    assert all(tensor.numpy().tobytes() == expected[name].numpy().tobytes() for name, tensor in prompts.items())
    for name in ("metrics.json", "predictions.parquet", "steps.jsonl"):
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    kept = ("kept_epoch", "validation_accuracy")
    provenance, record = (read_json(run / "provenance.json") for run in (path, whole))
    assert [provenance[name] for name in kept] == [record[name] for name in kept]
    assert {entry.name for entry in path.iterdir()} == {entry.name for entry in whole.iterdir()}


def test_killed_at_random_moments_it_ends_with_the_same_bits(
    long_config: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    moments = random.Random(5)
    died_at: list[int] = []
    while len(died_at) < DEATHS:
        folder = tmp_path / f"after-{len(died_at)}-deaths"
        write_config(long_config, folder)
        while not finished_before_its_death(folder, moments):
            died_at.append(rows_logged(folder))
        assert_same_bits(only_run(folder), whole_run)
    print(f"rows in the log of steps at each death: {died_at}")
    assert len(set(died_at)) > DEATHS / 2, "they were many different moments"


def finished_before_its_death(folder: Path, moments: random.Random) -> bool:
    """Let a process work until it has logged some rows and some time has passed, or a while after its start; then kill it."""
    worker, rows = process(folder), rows_logged(folder) + moments.randint(0, 160)
    worker.start()
    if moments.random() < 0.8:
        while rows_logged(folder) < rows and worker.is_alive():
            time.sleep(0.002)
        worker.join(moments.uniform(0, 0.05))
    else:
        worker.join(moments.uniform(0, 2))
    worker.kill()
    worker.join()
    assert worker.exitcode in (0, -signal.SIGKILL)
    return worker.exitcode == 0


def rows_logged(folder: Path) -> int:
    logs = list((folder / "runs").glob("*.partial/steps.jsonl"))
    return len(logs[0].read_text().splitlines()) if logs else 0


def start(launcher: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *RUN, "config.yaml"],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_steps(folder: Path, count: int, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while rows_logged(folder) < count:
        assert running.poll() is None and time.monotonic() < deadline, "it should be training"
        time.sleep(0.01)


def test_sigterm_is_a_clean_end_and_another_process_goes_on(
    long_config: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    write_config({**long_config, "run": {**long_config["run"], "checkpoint_steps": None}}, tmp_path)
    running = start(PYTHON, tmp_path)
    wait_for_steps(tmp_path, 100, running)
    running.send_signal(signal.SIGTERM)
    _, screen = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert screen.splitlines()[-1] == "SIGTERM: the run stops here; the same command goes on"
    stopped = only_run(tmp_path)
    found = latest(stopped / "checkpoints")
    assert found is not None and found.step > 50
    assert not (stopped / "failed.json").exists()
    again = launch([*PYTHON, *RUN, "config.yaml"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"training goes on after step {found.step} of 450" in again.stderr
    assert_same_bits(only_run(tmp_path), whole_run)


@pytest.mark.parametrize("launcher", [PYTHON, torchrun(2)])
def test_sigterm_while_features_are_encoded(long_config: dict[str, Any], tmp_path: Path, launcher: list[str]) -> None:
    """All ranks stop between two batches; what is in the bank is not encoded again."""
    execution = {**long_config["run"], "eval_batch_size": 1}
    train = {**long_config["train"], "views": "all", "epochs": 200}
    write_config({**long_config, "run": execution, "train": train}, tmp_path)
    running = start(launcher, tmp_path)
    deadline = time.monotonic() + 120
    while not stored(tmp_path):
        assert running.poll() is None and time.monotonic() < deadline, "it should be encoding"
        time.sleep(0.01)
    asked = time.monotonic()
    running.send_signal(signal.SIGTERM)
    _, screen = running.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert "SIGTERM: the run stops here; the same command goes on" in screen
    assert "Traceback" not in screen.partition("SIGTERM: the run stops here")[0]
    stopped = only_run(tmp_path)
    assert not (stopped / "failed.json").exists()
    assert not (stopped / "steps.jsonl").exists(), "it was not training yet"
    if launcher == PYTHON:
        assert running.returncode == 128 + signal.SIGTERM
    before = stored(tmp_path)
    assert before < 200 * 18
    again = start(launcher, tmp_path)
    wait_for_steps(tmp_path, 1, again)
    again.send_signal(signal.SIGTERM)
    _, screen = again.communicate(timeout=60)
    (images,) = re.findall(r"encode views: (\d+) images", screen)
    ranks = 1 if launcher == PYTHON else 2
    assert abs(int(images) - (200 * 18 - before) / ranks) <= 1, "only what was missing"


def stored(folder: Path) -> int:
    """Count the features that the bank of a folder holds."""
    root = folder / "runs" / ".bank"
    return sum(bank.records for bank in list_banks(root)) if root.is_dir() else 0


def test_several_processes_stop_at_one_step_and_one_process_goes_on(
    long_config: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    write_config(long_config, tmp_path)
    killed = start(torchrun(2), tmp_path)
    wait_for_steps(tmp_path, 60, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    kill_workers(tmp_path)
    killed.communicate()
    asked = start(torchrun(2), tmp_path)
    wait_for_steps(tmp_path, 120, asked)
    asked.send_signal(signal.SIGTERM)
    _, screen = asked.communicate(timeout=60)
    assert "SIGTERM: the run stops here; the same command goes on" in screen
    stopped = only_run(tmp_path)
    found = latest(stopped / "checkpoints")
    assert found is not None and found.step > 60
    ended = [
        re.findall(r"the run stops .*|another process.*", log.read_text()) for log in sorted(stopped.glob("logs/*"))
    ]
    assert ended == [["the run stops here; the same command goes on"]] * 2, "both ranks, each of its own accord"
    assert not (stopped / "failed.json").exists()
    again = launch([*PYTHON, *RUN, "config.yaml"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"training goes on after step {found.step} of 450" in again.stderr
    # Two ranks moved it by up to 1.05e-5. It is the rounding of backward passes for parts of a batch: in one process
    # `run.micro_batch` of 3 and of 1 move it by 5e-6, in float64 by 1e-13; adding the parts' gradients in float64 changes no bit.
    assert_same_run(only_run(tmp_path), whole_run, within=3e-5)


def kill_workers(folder: Path) -> None:
    """End what works in a folder: what torchrun started is in sessions of their own."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").resolve() == folder.resolve() and int(entry.name) != os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue
