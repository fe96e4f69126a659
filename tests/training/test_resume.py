"""Runs of this process that end at any step, and go on; real deaths are in tests/integration/test_kill_and_resume.py."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

import vipbench.harness.system.signals
from tests.dying import Death, at_step, die
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Output, TextClassifier
from vipbench.harness.runs.directory import failure, is_running, new_run
from vipbench.harness.runs.execute import execute, fill_banks
from vipbench.harness.runs.inputs import load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json
from vipbench.harness.system.signals import Stopped
from vipbench.harness.training.checkpoint import latest
from vipbench.harness.training.loop import Training


def config(base: dict[str, Any], out: Path, *overrides: str) -> Config:
    every = ["run.log_every=1", "run.checkpoint_steps=2", "run.eval_batch_size=8"]
    return resolve_config(override(base, [f"run.out={out}", *every, *overrides]))


def record(run: Path) -> tuple[dict[str, list[float]], str, Any]:
    """Everything that a run's result consists of."""
    prompts = {name: tensor.flatten().tolist() for name, tensor in load_file(run / "prompts.safetensors").items()}
    return prompts, (run / "steps.jsonl").read_text(), read_json(run / "metrics.json")


@pytest.fixture(scope="module")
def whole_run(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return execute(config({**base_config, "train": RECIPE}, tmp_path_factory.mktemp("whole")))


RECIPE = {"epochs": 3, "batch_size": 5, "lr": 0.05, "select": "best"}


@pytest.fixture
def mortal_config(base_config: dict[str, Any], whole_run: Path, tmp_path: Path) -> Config:
    """The same run elsewhere, whose bank is there already."""
    (tmp_path / ".bank").symlink_to(whole_run.parent / ".bank")
    return config({**base_config, "train": RECIPE}, tmp_path)


def partial(out: Path) -> Path:
    (path,) = out.glob("*.partial")
    return path


@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_that_died_ends_with_the_same_bits(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    at_step(step, die, monkeypatch)
    with pytest.raises(Death):
        execute(mortal_config)
    run = execute(mortal_config)
    assert record(run) == record(whole_run)
    assert read_json(run / "provenance.json")["resumed_after_step"] == max(0, (step - 1) // 2 * 2)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole_run.iterdir())


def test_a_run_that_died_while_testing_does_not_train_again(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Job, "test", die)
        with pytest.raises(Death):
            execute(mortal_config)
    monkeypatch.setattr(Training, "advance", die)
    assert record(execute(mortal_config)) == record(whole_run)


def test_force_starts_anew(mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(7, die, monkeypatch)
    with pytest.raises(Death):
        execute(mortal_config)
    run = execute(mortal_config, force=True)
    assert read_json(run / "provenance.json")["resumed_after_step"] == 0
    assert record(run) == record(whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_at_a_checkpoint(
    mortal_config: Config,
    whole_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(vipbench.harness.system.signals, "SECONDS_BETWEEN_EXCHANGES", 0.0)
    at_step(5, lambda _: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(SystemExit) as ended:
        execute(mortal_config)
    assert ended.value.code == 128 + number
    assert f"{number.name}: the run stops here; the same command goes on" in caplog.text
    stopped = partial(mortal_config.run.out)
    found = latest(stopped / "checkpoints")
    assert found is not None and found.step == 5
    assert failure(mortal_config.run.out / whole_run.name) is None, "it did not fail"
    assert record(execute(mortal_config)) == record(whole_run)


@pytest.mark.parametrize("passes", range(1, 8))
@pytest.mark.slow
def test_a_signal_during_validation_and_test_loses_nothing(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """An epoch whose validation was interrupted is validated when the run goes on. Two batches of nine, three of 21."""
    monkeypatch.setattr(vipbench.harness.system.signals, "SECONDS_BETWEEN_EXCHANGES", 0.0)
    done, predict = 0, TextClassifier.forward

    def signalled(self: TextClassifier, inputs: Tensor) -> Output:
        nonlocal done
        if not self.training:
            done += 1
            if done == passes:
                os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, inputs)

    execution = mortal_config.run.model_copy(update={"checkpoint_steps": None})
    run = mortal_config.model_copy(update={"run": execution})
    monkeypatch.setattr(TextClassifier, "forward", signalled)
    with pytest.raises(SystemExit) as ended:
        execute(run)
    assert ended.value.code == 128 + signal.SIGTERM
    found = latest(partial(mortal_config.run.out) / "checkpoints")
    assert found is not None and found.step == 3 * min(3, (passes + 1) // 2)
    assert record(execute(run)) == record(whole_run)


@pytest.mark.slow
def test_a_signal_while_a_run_loads_or_waits_for_the_bank(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_inputs(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("vipbench.harness.runs.execute.load_inputs", signalled)
        with pytest.raises(Stopped):
            execute(mortal_config)
    assert not list(mortal_config.run.out.glob("*.partial"))
    job = Job.__init__

    def signalled_soon(*arguments: Any) -> None:
        job(*arguments)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    monkeypatch.setattr(Job, "__init__", signalled_soon)
    with contextlib.ExitStack() as locked:
        for bank in (whole_run.parent / ".bank").iterdir():
            locked.enter_context(FileLock(bank / ".lock"))
        with pytest.raises(Stopped) as ended:
            execute(mortal_config)
    assert ended.value.code == 128 + signal.SIGUSR1


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.slow
def test_a_signal_ends_packed_runs_each_at_its_checkpoint(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """In a step (0), or as one of them validates."""

    def configs(out: Path) -> list[Config]:
        own = ("data.shots=2", "seed=2", "method=coop"), ("data.shots=5", "seed=3", "method=coop")
        return [config({**base_config, "train": RECIPE}, out, "run.checkpoint_steps=null", *it) for it in own]

    monkeypatch.setattr(vipbench.harness.system.signals, "SECONDS_BETWEEN_EXCHANGES", 0.0)
    assert execute_together(configs(tmp_path / "whole")) == {}
    done, predict = 0, TextClassifier.forward

    def signalled(self: TextClassifier, inputs: Tensor) -> Output:
        nonlocal done
        done += not self.training
        if done == passes and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, inputs)

    monkeypatch.setattr(TextClassifier, "forward", signalled)
    if not passes:
        at_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(Stopped):
        execute_together(configs(tmp_path / "stopped"))
    found = [latest(path / "checkpoints") for path in sorted((tmp_path / "stopped").glob("*.partial"))]
    assert all(found) and len(found) == 2
    assert execute_together(configs(tmp_path / "stopped")) == {}
    for run in configs(tmp_path / "whole"):
        (whole,) = run.run.out.glob(f"coop_*seed{run.seed}*")
        went_on = tmp_path / "stopped" / whole.name
        prompts, expected = (load_file(path / "prompts.safetensors") for path in (went_on, whole))
        # Runs that stopped at different steps share other passes afterwards, whose sums are rounded otherwise.
        assert (prompts["context"] - expected["context"]).abs().max() < 1e-5
        logs = [[json.loads(line) for line in (path / "steps.jsonl").open()] for path in (went_on, whole)]
        assert [row.keys() for row in logs[0]] == [row.keys() for row in logs[1]]


@pytest.mark.slow
def test_loading_processes_leave_signals_to_their_run(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler may send SIGTERM to all processes of a job."""

    def terminate(_: Training) -> None:
        children = multiprocessing.active_children()
        assert len(children) == 2
        for child in children:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGTERM)

    at_step(2, terminate, monkeypatch)
    execution = mortal_config.run.model_copy(update={"bank": False, "workers": 2})
    run = execute(mortal_config.model_copy(update={"run": execution}))
    prompts, expected = (load_file(path / "prompts.safetensors") for path in (run, whole_run))
    assert all((prompts[name] - expected[name]).abs().max() < 1e-5 for name in expected)


def test_a_damaged_line_in_the_log_of_steps_does_not_block_a_resume(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at_step(5, die, monkeypatch)
    with pytest.raises(Death):
        execute(mortal_config)
    steps = partial(mortal_config.run.out) / "steps.jsonl"
    lines = steps.read_bytes().splitlines(keepends=True)
    damaged = [
        b'{"step": \xff\n',
        b"[]\n",
        b'{"loss": 1}\n',
        b'{"step": null}\n',
        b"\0\0\n",
        b"\n",
        b"[" * 3000 + b"\n",
    ]
    steps.write_bytes(b"".join([lines[0], *damaged, *lines[1:]]))
    assert record(execute(mortal_config)) == record(whole_run)
    assert f"{steps}: 7 lines are damaged" in caplog.text


def test_a_file_where_a_folder_should_be_is_a_clear_end(base_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UserError, match="file: there is a file where a folder is needed"):
            execute(config(base_config, out))
        with pytest.raises(UserError, match="file: there is a file where a folder is needed"):
            fill_banks([config(base_config, out)])
    with pytest.raises(UserError, match="file: there is a file where this run's directory should be"):
        new_run(tmp_path / "file").__enter__()


def test_what_replacing_a_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".run.7.old").mkdir()
    with new_run(tmp_path / "run"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


@pytest.mark.parametrize("content", ["", "{}", "[]", "{"])
def test_a_damaged_record_of_a_failure_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "failed.json").write_text(content)
    assert "failed.json is damaged" in str(failure(tmp_path / "run"))


def test_a_failure_is_recorded_until_the_run_goes_on(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Training) -> None:
        raise UserError("power\ncut")

    at_step(5, fail, monkeypatch)
    with pytest.raises(UserError, match="power"):
        execute(mortal_config)
    assert failure(mortal_config.run.out / whole_run.name) == r"power\ncut", "on one line"
    run = execute(mortal_config)
    assert failure(run) is None
    assert record(run) == record(whole_run)


@pytest.mark.parametrize(
    ("log_every", "reason"), [(1, "the loss is nan at epoch 2, step 4"), (100, "context is not finite after step 4")]
)
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    mortal_config: Config, monkeypatch: pytest.MonkeyPatch, log_every: int, reason: str
) -> None:
    def spoil(training: Training) -> None:
        for parameter in training.method.trainable().values():
            parameter.data.fill_(float("nan"))

    at_step(3, spoil, monkeypatch)
    execution = mortal_config.run.model_copy(update={"log_every": log_every})
    with pytest.raises(UserError, match=reason):
        execute(mortal_config.model_copy(update={"run": execution}))
    stopped = partial(mortal_config.run.out)
    found = latest(stopped / "checkpoints")
    assert found is not None and found.step == 2
    assert "try a lower train.lr" in read_json(stopped / "failed.json")["error"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_vanished_shard_is_one_line(
    base_config: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    subprocess.run(["cp", "-r", dataset, tmp_path / "data"], check=True)
    overrides = [f"data.path={tmp_path / 'data'}", "run.bank=false", f"run.workers={workers}", "method=coop"]
    run = config(base_config, tmp_path / "runs", *overrides)
    (shard,) = (tmp_path / "data").rglob("*test*.tar")
    at_step(9, lambda _: shard.unlink(), monkeypatch)
    with pytest.raises(UserError) as error:
        execute(run)
    assert str(error.value) == f"{shard}: cannot be read: No such file or directory"
    assert read_json(partial(tmp_path / "runs") / "failed.json")["error"] == str(error.value)
    subprocess.run(["cp", "-r", *dataset.glob("*"), tmp_path / "data"], check=True)
    monkeypatch.setattr(Training, "advance", die)
    assert execute(run).is_dir(), "the shard is back, and nothing is trained again"


def test_a_limit_to_a_files_size_is_a_clear_end(
    mortal_config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard)), monkeypatch)
    try:
        with pytest.raises(UserError, match="File too large; what was written before is whole"):
            execute(mortal_config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    screen = capfd.readouterr().err
    assert "rank-0.log: nothing more is logged there: File too large" in screen
    assert "Traceback" not in screen
    stopped = partial(mortal_config.run.out)
    assert "File too large" in read_json(stopped / "failed.json")["error"]
    assert {path.stem for path in (stopped / "checkpoints").iterdir()} == {"step-00000002"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here; that takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_a_clear_end(
    base_config: dict[str, Any],
    whole_run: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (small_disk / ".bank").symlink_to(whole_run.parent / ".bank")
    run = config({**base_config, "train": RECIPE}, small_disk)

    def fill(_: Training) -> None:
        with (small_disk / "big").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    at_step(3, fill, monkeypatch)
    with pytest.raises(UserError, match="No space left on device; what was written before is whole"):
        execute(run)
    assert "why the run failed cannot be recorded there: No space left on device" in caplog.text
    assert not list(partial(small_disk).glob(".*")), "nothing half-written"
    (small_disk / "big").unlink()
    finished = execute(run)
    assert read_json(finished / "provenance.json")["resumed_after_step"] == 2
    assert record(finished) == record(whole_run)


def test_a_read_only_folder_is_a_clear_end(base_config: dict[str, Any], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        execute(config(base_config, small_disk))


def test_asking_whether_a_run_works_keeps_none_from_starting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not is_running(run)
    with new_run(run):
        assert is_running(run)
    assert not is_running(run)


def test_packed_runs_go_on_each_from_its_own_checkpoint(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configs(out: Path) -> list[Config]:
        own = ("data.shots=2", "seed=2"), ("data.shots=5", "seed=3")
        return [config({**base_config, "train": RECIPE}, out, *overrides) for overrides in own]

    assert execute_together(configs(tmp_path / "whole")) == {}
    at_step(5, die, monkeypatch)
    with pytest.raises(Death):
        execute_together(configs(tmp_path / "dead"))
    assert execute_together(configs(tmp_path / "dead")) == {}
    for run in configs(tmp_path / "whole"):
        (whole,) = run.run.out.glob(f"vip_*seed{run.seed}*")
        assert record(tmp_path / "dead" / whole.name) == record(whole)
