"""One training step of each method that trains inside the image tower, against plain PyTorch (benchmarks/plain_towers.py).

    python -m benchmarks tower_step

ViT-B-16 with random weights, fp32, 2 and 10 classes, the method's own batch and optimizer; pixels are there already. Both sides
do forward, backward and the optimizer's step, in turn, and a ratio is the median over rounds. The plain step takes full prompts
("full", 77 tokens) or prompts cut after the longest ("cut"), both without activation checkpointing, which our step leaves out
too where `run.image_memory_gib` allows; "recomputed" checkpoints every block of the image tower on both sides (prompts cut). On
a CPU times are of the process, all threads together.
"""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, interleaved_seconds
from benchmarks.plain_towers import PLAIN, Loss, Plain
from vipbench.harness.config.schema import BackboneConfig, TrainConfig
from vipbench.harness.distributed.engines.engine import make_engine
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import READ_IN_PIECES, Backbone
from vipbench.harness.models.open_clip import create
from vipbench.harness.models.tower_view import Block
from vipbench.harness.system.devices import choose_device
from vipbench.harness.training.loop import WeightedLoss
from vipbench.harness.training.optimizer import make_optimizer

MODEL = "ViT-B-16"
CLASSES = [f"finding number {number} of the skin" for number in range(10)]
COUNTS = (2, 10)
SHOTS = 16
ROUNDS = 3
BATCH: int | None = None  # None: the method's

Step = Callable[[], Any]


def measure() -> Result:
    """Seconds of all steps, and ratios."""
    names = [name for name in method_names() if method_class(name).needs == "images"]
    topology = Topology(choose_device("auto").type, "fp32")
    try:
        rows = [_row(name, CLASSES[:count], topology) for name in names if name in PLAIN for count in COUNTS]
    finally:
        topology.close()
    missing = [f"{name}: no plain step is written for it" for name in names if name not in PLAIN]
    return Result(f"A training step inside the image tower against plain PyTorch ({MODEL}, fp32)", rows, missing)


def _row(name: str, classes: list[str], topology: Topology) -> dict[str, Any]:
    torch.manual_seed(0)
    cls = method_class(name)
    config = cls.Config(name=name)
    train = TrainConfig(**cls.recipe(config, SHOTS, MODEL))
    batch = BATCH or train.batch_size
    model, tokenizer, architecture = create(BackboneConfig(name=MODEL))
    model = model.requires_grad_(False).eval().to(topology.device)
    method = cls(config, Task(classes), Backbone(copy.deepcopy(model), tokenizer, architecture).to(topology.device))
    method.to(topology.device)
    pixels = torch.randn(batch, *method.backbone.pixels_shape, device=topology.device)
    labels = torch.arange(batch, device=topology.device) % len(classes)

    def plain(cut: bool, recompute: bool) -> Step:
        values = {key: nn.Parameter(value.detach().clone()) for key, value in method.trainable().items()}
        loss = PLAIN[name](Plain(copy.deepcopy(model), tokenizer, cut, recompute), method, values)
        _check_same(method, loss, pixels, labels)
        optimizer = make_optimizer([{"params": list(values.values())}], train)
        return lambda: _plain_step(loss, optimizer, pixels, labels)

    own = _our_step(method, train, topology, pixels, labels)
    steps = {
        "ours": own,
        "full": plain(cut=False, recompute=False),
        "cut": plain(cut=True, recompute=False),
        "ours, recomputed": lambda: _recomputed(method, own),
        "recomputed": plain(cut=True, recompute=True),
    }
    seconds = interleaved_seconds(steps, ROUNDS)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}

    def ratio(theirs: str, ours: str) -> float:
        return statistics.median(one / other for one, other in zip(seconds[theirs], seconds[ours], strict=True))

    return {
        "method": name,
        "classes": len(classes),
        "batch": batch,
        "ours_s": medians["ours"],
        "full_s": medians["full"],
        "cut_s": medians["cut"],
        "ratio_full": ratio("full", "ours"),
        "ratio_cut": ratio("cut", "ours"),
        "ours_recomputed_s": medians["ours, recomputed"],
        "recomputed_s": medians["recomputed"],
        "ratio_recomputed": ratio("recomputed", "ours, recomputed"),
    }


def _check_same(method: Method, loss: Loss, pixels: Tensor, labels: Tensor) -> None:
    method.eval()  # without dropout
    with torch.no_grad():
        difference = (loss(pixels, labels)[0] - method(pixels).logits).abs().max()
    method.train()
    assert difference < 1e-3, f"{method.config.name}: both sides compute the same; found {difference} between logits"


def _our_step(method: Method, train: TrainConfig, topology: Topology, pixels: Tensor, labels: Tensor) -> Step:
    """A step as the training loop takes it."""
    loss = WeightedLoss(method)
    optimizer = make_optimizer(method.parameter_groups(), train)
    engine = make_engine(topology, loss, optimizer, train.max_grad_norm, READ_IN_PIECES)
    weights = torch.full_like(labels, 1 / len(labels), dtype=torch.float32)
    keys = torch.arange(len(labels), device=labels.device)
    return lambda: engine.step([(pixels, labels, weights, keys, keys[0])])


def _recomputed(method: Method, step: Step) -> None:
    """Take our step with no memory for activations."""
    blocks = [module for module in method.modules() if isinstance(module, Block)]
    kept = [block.memory_bytes for block in blocks]
    for block in blocks:
        block.memory_bytes = 0
    step()
    for block, memory in zip(blocks, kept, strict=True):
        block.memory_bytes = memory


def _plain_step(loss: Loss, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    loss(pixels, labels)[1].backward()
    optimizer.step()
