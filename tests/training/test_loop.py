"""The schedule, the order of samples, and the loop itself on a method small enough to follow."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vipbench.harness.config.schema import RunConfig, TrainConfig
from vipbench.harness.distributed.engines.ddp import PlainEngine
from vipbench.harness.distributed.launcher import announced_launcher, announced_world
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Output, Task
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.system.devices import choose_device
from vipbench.harness.training.batches import Batch, global_batches
from vipbench.harness.training.checkpoint import Checkpoints
from vipbench.harness.training.loop import Training, fit
from vipbench.harness.training.optimizer import make_optimizer
from vipbench.harness.training.schedule import learning_rate


def test_learning_rate_is_dassls_constant_warm_up_and_cosine() -> None:
    """Against torch's own scheduler, stepped as Dassl does: constant in epoch 1, then the cosine from its start."""
    train = TrainConfig(lr=0.002, epochs=10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = [1e-5]
    for _ in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [learning_rate(epoch, train) for epoch in range(1, 11)] == pytest.approx(expected, rel=1e-9)
    assert learning_rate(10, train) == pytest.approx(0.001 * (1 + math.cos(math.pi * 8 / 10)))


def test_global_batches_cut_the_order_and_drop_a_short_rest() -> None:
    batches = global_batches(np.arange(10), 4)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(batch) for batch in global_batches(np.arange(3), 32)] == [3], "fewer than a batch: all of them"
    assert [len(batch) for batch in global_batches(np.arange(8), 4)] == [4, 4]


class Line(Method):
    """The smallest method: one weight; the loss of a sample is (w x - y)^2."""

    def __init__(self) -> None:
        super().__init__(None, Task([]), nn.Identity())  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.tensor(0.0))
        self.frozen = nn.Parameter(torch.tensor(5.0), requires_grad=False)

    def forward(self, inputs: Tensor) -> Output:
        return Output(self.weight * inputs)

    def losses(self, output: Output, labels: Tensor) -> dict[str, Tensor]:
        return {"squared": (output.logits - labels) ** 2}


class Batches:
    """Two samples, which are one batch; two steps an epoch."""

    steps_per_epoch = 2
    seed = 1
    samples = range(4)

    def __init__(self, epochs: int) -> None:
        self.epochs, self.steps = epochs, 2 * epochs

    def after(self, done: int) -> Iterator[Batch]:
        keys = torch.arange(2)
        batch = Batch(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), torch.tensor([0.5, 0.5]), keys, keys[0])
        yield from [batch] * (self.steps - done)


class Validation:
    """Stands for a validation set whose accuracies and losses are given; notes the weight that it was asked about."""

    def __init__(self, accuracies: list[float], losses: list[float] | None = None) -> None:
        self.accuracies, self.losses = accuracies, losses or [1.0] * len(accuracies)
        self.weights: list[float] = []

    def predict(self, method: Any) -> "Validation":
        self.weights.append(method.weight.item())
        return self

    def accuracy(self) -> float:
        return self.accuracies[len(self.weights) - 1]

    def loss(self) -> float:
        return self.losses[len(self.weights) - 1]


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topology]:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    topology = Topology("cpu", "fp32")
    yield topology
    topology.close()


def training(topology: Topology, rows: list[dict[str, Any]], validation: Any = None, **recipe: Any) -> Training:
    train = TrainConfig(**{"lr": 0.02, "epochs": 4, "batch_size": 2, "warmup_lr": 0.01, **recipe})
    assert train.epochs
    return Training(Line(), Batches(train.epochs), validation, train, topology, rows.append, log_every=1)  # type: ignore[arg-type]


def run(
    topology: Topology, validation: Any = None, micro_batch: int | None = None, **recipe: Any
) -> tuple[Line, Any, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    job = training(topology, rows, validation, **recipe)
    kept = fit(job, Checkpoints(None, topology, RunConfig()), micro_batch)
    return job.method, kept, rows  # type: ignore[return-value]


def test_the_loop_is_sgd_with_the_schedule(topology: Topology) -> None:
    line, kept, rows = run(topology, momentum=0.5, weight_decay=0.1)
    weight, velocity = 0.0, 0.0
    for epoch in range(1, 5):
        rate = learning_rate(epoch, TrainConfig(lr=0.02, epochs=4, warmup_lr=0.01))
        for _ in range(2):
            gradient = sum(0.5 * 2 * (weight * x - y) * x for x, y in ((1, 3), (2, 6))) + 0.1 * weight
            velocity = 0.5 * velocity + gradient
            weight -= rate * velocity
    assert line.weight.item() == pytest.approx(weight, rel=1e-5)
    assert line.frozen.item() == 5.0
    assert kept.epoch == 4
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["loss"] == pytest.approx((9 + 36) / 2)
    assert rows[0]["lr"] == 0.01


def test_a_step_does_not_visit_the_modules_of_a_frozen_backbone(
    vit_backbone: Backbone, visited: list[nn.Module]
) -> None:
    """They stay in evaluation mode, and are many: visiting them takes longer than a small step."""
    method = Method(None, Task(["nevus"]), vit_backbone)
    visited.clear()
    method.train()
    method.eval()
    assert visited == [method, method] and not method.training
    assert not any(module.training for module in vit_backbone.modules())


def test_without_fp16_the_optimizer_takes_the_step_itself(topology: Topology) -> None:
    """accelerate's wrapper takes longer than a small step."""
    job = training(topology, [])
    engine = job.engine()
    assert isinstance(engine, PlainEngine) and engine.optimizer is job.optimizer


def test_micro_batches_add_up_to_the_batch(topology: Topology) -> None:
    whole, _, rows = run(topology)
    parts, _, rows_of_parts = run(topology, micro_batch=1)
    assert parts.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6)
    assert [row["loss"] for row in rows_of_parts] == pytest.approx([row["loss"] for row in rows])


def test_gradients_are_clipped(topology: Topology) -> None:
    line, _, _ = run(topology, momentum=0, weight_decay=0, max_grad_norm=0.5, epochs=1, warmup_epochs=0, warmup_lr=None)
    assert line.weight.item() == pytest.approx(2 * 0.02 * 0.5), "two steps with a gradient of norm 0.5"


@pytest.mark.parametrize("done", range(9))
def test_training_goes_on_at_any_step(topology: Topology, done: int) -> None:
    job = training(topology, [])
    job.step = done
    fit(job, Checkpoints(None, topology, RunConfig()))
    rates = [learning_rate(epoch, job.train) for epoch in (1, 1, 2, 2, 3, 3, 4, 4)][done:]
    weight, velocity = 0.0, 0.0
    for rate in rates:
        velocity = 0.9 * velocity + sum((weight * x - y) * x for x, y in ((1, 3), (2, 6))) + 5e-4 * weight
        weight -= rate * velocity
    assert job.step == 8
    assert job.method.weight.item() == pytest.approx(weight, rel=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("ties", "losses", "epoch"),
    [
        ("first", [0.9, 0.5, 0.4, 0.1], 2),
        ("lower_loss", [0.9, 0.5, 0.4, 0.1], 3),
        ("lower_loss", [0.9, 0.5, 0.5, 0.1], 2),
        (None, [0.9, 0.5, 0.4, 0.1], 3),
    ],
)
def test_best_keeps_the_most_accurate_epoch(
    topology: Topology, ties: str | None, losses: list[float], epoch: int
) -> None:
    validation = Validation([0.1, 0.7, 0.7, 0.2], losses)
    line, kept, rows = run(topology, validation, select="best", select_ties=ties)
    assert (kept.epoch, kept.validation_accuracy, kept.validation_loss) == (epoch, 0.7, losses[epoch - 1])
    assert kept.improved and kept.warnings(TrainConfig()) == []
    assert line.weight.item() == validation.weights[epoch - 1] != validation.weights[3]
    assert [row["validation_accuracy"] for row in rows if "validation_accuracy" in row] == [0.1, 0.7, 0.7, 0.2]


def test_a_selection_that_chose_nothing_says_so(topology: Topology) -> None:
    """Eight validation images, which the untrained prompts get as right as the trained ones: the first of ties is the warm-up."""
    _, kept, _ = run(topology, Validation([0.5, 0.5, 0.4, 0.5]), select="best", select_ties="first")
    warm_up, flat = kept.warnings(TrainConfig())
    assert "epoch 1 is kept, which is of the warm-up" in warm_up
    assert "never rose above that of epoch 1 (0.5000)" in flat
    _, kept, _ = run(topology, Validation([0.5, 0.5, 0.4, 0.5], [1.0, 0.9, 0.8, 0.7]), select="best")
    assert kept.epoch == 4 and len(kept.warnings(TrainConfig())) == 1


def test_last_ignores_validation(topology: Topology) -> None:
    line, kept, _ = run(topology, None, select="last")
    assert kept.validation_accuracy is None
    assert line.weight.item() != 0


def test_best_without_validation_is_refused(topology: Topology) -> None:
    with pytest.raises(UserError, match="never used to select"):
        run(topology, None, select="best")


def test_a_loss_that_is_not_finite_ends_the_run(topology: Topology) -> None:
    with pytest.raises(UserError, match=r"the loss is (inf|nan) at epoch \d+, step \d+; try a lower train\.lr"):
        run(topology, lr=1e30, warmup_lr=1e30)


def test_adamw_gets_the_recipe() -> None:
    optimizer = make_optimizer(
        [{"params": [nn.Parameter(torch.zeros(1))]}], TrainConfig(optimizer="adamw", lr=0.1, weight_decay=0.3)
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.3)


def test_restoring_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="they must agree"):
        Line().load_learned({"weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("environment", "launcher", "world"),
    [
        ({}, "python", 1),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"}, "torchrun", 4),
        ({"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "accelerate", 2),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate", 1),
    ],
)
def test_launchers_are_told_by_their_variables(environment: dict[str, str], launcher: str, world: int) -> None:
    assert (announced_launcher(environment), announced_world(environment)) == (launcher, world)


def test_a_world_that_is_not_the_announced_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="started one; use torchrun"):
        announced_world({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(UserError, match="WORLD_SIZE says 2 processes, but no launcher started them"):
        announced_world({"WORLD_SIZE": "2"})
    monkeypatch.setattr("vipbench.harness.distributed.topology.announced_world", lambda environment: 2)
    with pytest.raises(UserError, match="python announced 2 processes, but 1 found each other"):
        Topology("cpu", "fp32")


def test_what_the_device_cannot_do_is_refused() -> None:
    for precision in ("fp16", "tf32"):
        with pytest.raises(UserError, match=f"{precision} needs a GPU"):
            Topology("cpu", precision)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            Topology("cuda", "fp32")


def test_fp32_is_full_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions use TF32 by default; the switches can be set without a GPU, and read as libraries do."""

    def switches() -> tuple[bool, bool]:
        with torch.backends.cudnn.flags(enabled=True):  # reads them all, and puts them back
            pass
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Topology("cpu", "fp32").close()
    assert switches() == (False, False)
    with monkeypatch.context() as patched:
        patched.setattr("torch.cuda.is_available", lambda: True)
        assert choose_device("auto", precision="tf32").type == "cuda"
    assert switches() == (True, True)
    for precision in ("bf16", "fp32"):
        choose_device("cpu", precision=precision)
        assert switches() == (False, False)
