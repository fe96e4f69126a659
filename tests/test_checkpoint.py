"""Checkpoints, and runs of this process that end at any step and go on; real deaths are in tests/integration."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import harness.checkpoint
from harness.checkpoint import Checkpoint, Checkpoints, Rhythm, latest, prune
from harness.config import Config, RunConfig, TrainConfig, override
from harness.errors import UserError
from harness.files import read_json
from harness.pack import execute_together
from harness.results import RunDirectory, failure, is_running, new_run
from harness.run import Job, execute
from harness.topology import Topology
from harness.train import Training, fit
from tests.test_train import Line, Validation, Views

TENSORS = {"learned/a": torch.arange(6.0).view(2, 3), "optimizer/a.step": torch.tensor(3.0)}


class Death(BaseException):
    """Stands for the end of a process: nothing handles it."""


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        Checkpoint(step, {"kept": {"epoch": step}}, TENSORS).write(folder)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.facts) == (7, {"kept": {"epoch": 7}})
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert latest(tmp_path / "nothing") is None


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip(step.with_suffix(".safetensors"), -1),
        lambda step: flip(step.with_suffix(".safetensors"), 0),
        lambda step: flip(step, step.read_bytes().index(b"9")),
        lambda step: step.write_text("[]"),
        lambda step: step.write_bytes(step.read_bytes()[:30]),
        lambda step: step.write_bytes(b""),
        lambda step: os.truncate(step.with_suffix(".safetensors"), 40),
        lambda step: step.with_suffix(".safetensors").unlink(),
        lambda step: step.unlink(),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 8, 9)
    step = tmp_path / "step-00000009.json"
    damage(step)
    found = latest(tmp_path)
    assert found is not None and found.step == 8
    assert ("passed over" in caplog.text and str(step.stem) in caplog.text) or not step.exists()
    (tmp_path / ".step-00000010.json.x.tmp").write_text("{")
    prune(tmp_path, 1, upto=8)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000008.json", "step-00000008.safetensors"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, 9, 100000000)
    prune(tmp_path, 2, upto=100000000)
    assert {path.stem for path in tmp_path.iterdir()} == {"step-00000009", "step-100000000"}


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learned/b is not finite after step 3, which is not saved; try a lower"):
        Checkpoint(3, {}, {**TENSORS, "learned/b": torch.tensor([0.0, float("nan")])}).write(tmp_path)
    assert latest(tmp_path) is None


def at_step(number: int, act: Callable[[Training], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen once, as a step has been counted, logged and selected by."""
    advance = Training.advance

    def advance_and_act(training: Training, loss: Tensor) -> None:
        advance(training, loss)
        if training.step == number:
            monkeypatch.setattr(Training, "advance", advance)
            act(training)

    monkeypatch.setattr(Training, "advance", advance_and_act)


def die(*_: Any) -> None:
    raise Death


class Dropping(Line):
    """A method that draws: dropout on its inputs."""

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(F.dropout(inputs, 0.5), labels)


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topology]:
    topology = Topology("cpu", "fp32")
    yield topology
    topology.close()


def small_training(topology: Topology, run: RunDirectory, recipe: dict[str, Any]) -> Training:
    train = TrainConfig(lr=0.02, epochs=4, warmup_lr=0.01, select="best", **recipe)
    validation: Any = Accuracy()
    return Training(Dropping(), Views(), validation, train, topology, run.write_step, log_every=1)  # type: ignore[arg-type]


class Accuracy(Validation):
    """An accuracy that depends on the weight alone."""

    def __init__(self) -> None:
        super().__init__([])

    def accuracy(self) -> float:
        return abs(self.weights[-1] * 1e4) % 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("recipe", [{"optimizer": "sgd"}, {"optimizer": "adamw"}, {"max_grad_norm": 0.1}])
def test_training_ends_with_the_same_bits_wherever_it_died(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], every: int
) -> None:
    def train(name: str) -> tuple[Any, Any, str, int]:
        run = RunDirectory(tmp_path / name)
        run.path.mkdir(exist_ok=True)
        training = small_training(topology, run, recipe)
        checkpoints = Checkpoints(run, topology, RunConfig(checkpoint_steps=every))
        kept = fit(training, checkpoints)
        weight = training.method.trainable()["weight"].item()
        return weight, kept, (run.path / "steps.jsonl").read_text(), checkpoints.resumed_after

    expected = train("whole")
    assert len(expected[2].splitlines()) == 8 + 4
    for step in range(1, 9):
        at_step(step, die, monkeypatch)
        with pytest.raises(Death):
            train(str(step))
        assert train(str(step)) == (*expected[:3], (step - 1) // every * every)


def test_a_log_of_steps_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "validation_accuracy": 1.0},
        {"step": 3},
    ]
    for row in rows:
        run.write_step(row)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.rewind(2)
    assert [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()] == rows[:3]


def test_checkpoints_come_by_steps_by_the_clock_and_by_signals(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    by_steps = Rhythm(topology, 4, None)
    assert [step for step in range(1, 11) if by_steps.due()] == [4, 8]
    by_minutes, due = Rhythm(topology, None, 0.5), []
    for step in range(1, 100):
        now += 1.0
        if by_minutes.due():
            due.append(step)
    assert due == [30, 60, 90]
    asked = Rhythm(topology, None, None)
    with asked.listening():
        assert not asked.due()
        os.kill(os.getpid(), signal.SIGUSR1)
        now += 1.0
        assert [asked.due() for _ in range(2)] == [False, True], "the second step after the first look is looked at"
    with pytest.raises(SystemExit) as ended:
        asked.end_if_asked()
    assert ended.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_ranks_do_not_ask_each_other_at_every_step(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 100.0, 0

    def gather(items: list[Any]) -> list[Any]:
        nonlocal asked
        asked += 1
        return items

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(topology, "gather", gather)
    rhythm = Rhythm(topology, None, 10)
    for _ in range(10_000):
        now += 0.001
        rhythm.due()
    assert 10 <= asked <= 25, "ten seconds of a thousand steps each, after a start with short ones"


def config(base: dict[str, Any], out: Path, *overrides: str) -> Config:
    every = ["run.log_every=1", "run.checkpoint_steps=2"]
    return Config.from_mapping(override(base, [f"run.out={out}", *every, *overrides]))


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
    monkeypatch.setattr(harness.checkpoint, "SECONDS_BETWEEN_LOOKS", 0.0)
    at_step(5, lambda _: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(SystemExit) as ended:
        execute(mortal_config)
    assert ended.value.code == 128 + number
    assert f"{number.name}: stopped at a checkpoint; the same command goes on" in caplog.text
    stopped = partial(mortal_config.run.out)
    found = latest(stopped / "checkpoints")
    assert found is not None and found.step == 5
    assert failure(mortal_config.run.out / whole_run.name) is None, "it did not fail"
    assert record(execute(mortal_config)) == record(whole_run)


def test_a_failure_is_recorded_until_the_run_goes_on(
    mortal_config: Config, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Training) -> None:
        raise UserError("power\ncut")

    at_step(5, fail, monkeypatch)
    with pytest.raises(UserError, match="power"):
        execute(mortal_config)
    assert failure(mortal_config.run.out / whole_run.name) == "power cut"
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
