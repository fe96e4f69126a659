"""Checkpoints: whole or passed over, when they are due, and a small training that goes on from them."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dying import Death, at_step, die
from tests.training.test_loop import Batches, Line, Validation
from vipbench.harness.config.schema import RunConfig, TrainConfig
from vipbench.harness.distributed.engines.optimizer_state import check_state
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Output
from vipbench.harness.runs.directory import RunDirectory
from vipbench.harness.system.files import digest_json, read_json
from vipbench.harness.system.signals import Stopped
from vipbench.harness.training.checkpoint import Checkpoint, Checkpoints, CheckpointSchedule, latest, prune
from vipbench.harness.training.loop import Training, fit

TENSORS = {"learned/a": torch.arange(6.0).view(2, 3), "optimizer/a.step": torch.tensor(3.0)}


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


def change(path: Path, edit: Callable[[dict[str, Any]], Any], tensors: bytes | None = None) -> None:
    """Edit a checkpoint and make its checksums right again."""
    content = read_json(path)
    del content["sha256"]
    edit(content)
    if tensors is not None:
        path.with_suffix(".safetensors").write_bytes(tensors)
        content["tensors"] = hashlib.sha256(tensors).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest_json(content)}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: change(step, lambda content: None, tensors=b"no tensors"),
        lambda step: change(step, lambda content: content.pop("step")),
        lambda step: change(step, lambda content: content.pop("tensors")),
        lambda step: change(step, lambda content: content.update(step="9")),
        lambda step: change(step, lambda content: content.update(step=-9)),
        lambda step: change(step, lambda content: content.pop("format")),
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


class Dropping(Line):
    """A method that draws: dropout on its inputs."""

    def forward(self, inputs: Tensor) -> Output:
        return super().forward(F.dropout(inputs, 0.5))


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topology]:
    topology = Topology("cpu", "fp32")
    yield topology
    topology.close()


def small_training(topology: Topology, run: RunDirectory, recipe: dict[str, Any]) -> Training:
    train = TrainConfig(lr=0.02, epochs=4, batch_size=2, warmup_lr=0.01, select="best", **recipe)
    validation: Any = Accuracy()
    return Training(Dropping(), Batches(4), validation, train, topology, run.write_step, log_every=1)  # type: ignore[arg-type]


class Accuracy(Validation):
    """An accuracy that depends on the weight alone."""

    def __init__(self) -> None:
        super().__init__([])

    def accuracy(self) -> float:
        return abs(self.weights[-1] * 1e4) % 1

    def loss(self) -> float:
        return 1 - self.accuracy()


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


def only(prefix: str, tensors: dict[str, Tensor], present: bool = True) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) == present}


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({"cost": "much"}, None, "checkpoint of step 5: damaged: cost: "),
        ({"cost": {"seconds": "much"}}, None, "checkpoint of step 5: damaged: cost.seconds: "),
        ({"cost": {"seconds": -1.0}}, None, "checkpoint of step 5: damaged: cost.seconds: "),
        ({"cost": {"peak_bytes": 1.5}}, None, "checkpoint of step 5: damaged: cost.peak_bytes: "),
        ({"kept": None}, None, "checkpoint of step 5: damaged: kept: "),
        ({"kept": {"epoch": []}}, None, "checkpoint of step 5: damaged: kept.epoch: "),
        ({"kept": {"epoch": 2}}, None, "checkpoint of step 5: damaged: it holds what an epoch had learned, or "),
        ({"to_select": "perhaps"}, None, "checkpoint of step 5: damaged: to_select: "),
        (
            {},
            lambda all: only("kept/", all, False),
            "checkpoint of step 5: damaged: it holds what an epoch had learned",
        ),
        ({}, lambda all: {**all, "kept/weight": torch.zeros(3)}, "prompts: the file holds "),
        ({}, lambda all: only("learned/", all, False), "prompts: the file holds "),
        ({}, lambda all: {**all, "optimizer/other.step": torch.zeros(())}, "checkpoint: damaged: other.step "),
        (
            {},
            lambda all: {**all, "optimizer/method.weight.exp_avg": torch.zeros(3)},
            "checkpoint: damaged: method.weig",
        ),
    ],
)
def test_a_checkpoint_of_something_else_ends_in_one_line(
    topology: Topology,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    message: str,
) -> None:
    """Its checksums are right, as those of a file that another program wrote are."""
    run = RunDirectory(tmp_path)

    def train() -> None:
        training = small_training(topology, run, {"optimizer": "adamw"})
        fit(training, Checkpoints(run, topology, RunConfig(checkpoint_steps=1)))

    at_step(6, die, monkeypatch)
    with pytest.raises(Death):
        train()
    found = latest(run.checkpoints)
    assert found is not None and found.step == 5
    Checkpoint(5, {**found.facts, **facts}, tensors(found.tensors) if tensors else found.tensors).write(run.checkpoints)
    with pytest.raises(UserError) as error:
        train()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_checkpoint_of_a_longer_training_is_refused(topology: Topology, tmp_path: Path) -> None:
    training = small_training(topology, RunDirectory(tmp_path), {"optimizer": "sgd"})
    with pytest.raises(UserError, match="checkpoint of step 9: damaged: the training has 8 steps"):
        training.resume(9, *training.state())


def test_the_optimizer_state_of_each_parameter_is_whole() -> None:
    shapes, state = {"a": (3,), "b": (2,), "unused": (1,)}, {"a.m": torch.zeros(3), "a.step": torch.zeros(())}
    check_state(shapes, {**state, "b.m": torch.zeros(2), "b.step": torch.zeros(())})
    with pytest.raises(UserError, match="the optimizer's state of some parameter is not whole"):
        check_state(shapes, {**state, "b.m": torch.zeros(2)})


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
    by_steps = CheckpointSchedule(topology, 4, None)
    assert [step for step in range(1, 11) if by_steps.due()] == [4, 8]
    by_minutes, due = CheckpointSchedule(topology, None, 0.5), []
    for step in range(1, 100):
        now += 1.0
        if by_minutes.due():
            due.append(step)
    assert due == [30, 60, 90]
    asked = CheckpointSchedule(topology, None, None)
    with topology.signals.listening():
        assert not asked.due()
        os.kill(os.getpid(), signal.SIGUSR1)
        now += 1.0
        assert not asked.due(), "the second step after the first look is looked at"
        with pytest.raises(Stopped) as ended:
            asked.due()
    assert ended.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_signals_are_acted_on_between_passes(topology: Topology) -> None:
    """The output of a pass is taken first; a rank with fewer inputs looks as often as the others."""
    looks: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        looks.append(items)
        return items

    topology.signals.exchange.gather, taken = gather, []
    outputs = topology.map_batches(torch.exp, [torch.zeros(1), torch.ones(1)], 2, (1,), False)
    with topology.signals.listening():
        taken.append(next(outputs))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as ended:
            next(outputs)
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(taken) == 1
    topology.signals.received.clear()
    looks.clear()
    assert list(topology.map_batches(torch.exp, [], 1, (1,), False)) == []
    assert len(looks) == 1
    topology.signals.exchange.next_due += 1000  # after many fast passes of other work
    assert len(list(topology.map_batches(torch.exp, [torch.zeros(1)], 1, (1,), False))) == 1
    assert len(looks) == 2


def test_ranks_do_not_ask_each_other_at_every_step(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 100.0, 0

    def gather(items: list[Any]) -> list[Any]:
        nonlocal asked
        asked += 1
        return items

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(topology, "all_gather_objects", gather)
    schedule = CheckpointSchedule(topology, None, 10)
    for _ in range(10_000):
        now += 0.001
        schedule.due()
    assert 10 <= asked <= 25, "ten seconds of a thousand steps each, after a start with short ones"
