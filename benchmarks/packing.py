"""Eight runs trained together in one process against eight processes one after the other: `sweep run --pack`.

    python -m benchmarks packing

ViP with ViT-B-16 (random weights), 2 classes x 4 symptoms, 8 seeds, on a bank that is there already. Measured are whole sweeps,
from the command to the last run directory, and the training step alone within one process.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, count_flops, matrix_peak, median_seconds
from benchmarks.sweep import make_dataset, timed_sweep, write_grid
from benchmarks.training_step import CLASSES, SYMPTOMS, stepper
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.files import atomic_directory
from vipbench.harness.training.packing import RandomStream, compute_together

RUNS = 8
EPOCHS = 50
FEW_VIEWS = "train.views=4"  # so that filling the bank, which is not measured, is short


def measure() -> Result:
    """Seconds apart and together, of whole sweeps and of a step."""
    rows = [_steps(), _sweeps()]
    return Result(f"{RUNS} ViP runs packed (ViT-B-16, 2 classes x 4 symptoms, fp32)", rows, [])


def _steps() -> dict[str, Any]:
    torch.manual_seed(0)
    device = choose_device("auto").type
    backbone, cls = load_backbone(BackboneConfig(name="ViT-B-16"), device), method_class("vip")
    methods = [cls(cls.Config(name="vip"), Task(CLASSES, SYMPTOMS), backbone).to(device).train() for _ in range(RUNS)]
    features = F.normalize(torch.randn(32, backbone.dim, device=device), dim=-1)
    labels = torch.randint(2, (32,), device=device)
    steps = [stepper(method, labels) for method in methods]

    def apart() -> None:
        for step, method in zip(steps, methods, strict=True):
            step(partial(logits, method))

    optimizers = [torch.optim.SGD(list(method.trainable().values()), 0.002, momentum=0.9) for method in methods]

    def logits(method: Method) -> Tensor:
        return method(features).logits

    def loss(method: Method) -> Tensor:
        return method.losses(method(features), labels)["cross_entropy"]

    def together() -> None:
        computations = [partial(loss, method) for method in methods]
        losses = compute_together(backbone.text, computations, [RandomStream() for _ in methods])
        torch.stack(losses).mean(dim=1).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    seconds = {"apart": median_seconds(apart, 10), "together": median_seconds(together, 10)}
    floor = count_flops(together) / matrix_peak(device)
    return _row(f"a step of all {RUNS}", seconds["apart"], seconds["together"]) | {"floor_s": floor}


def _sweeps() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_dataset(folder / "data")
        axes = {"seed": list(range(1, RUNS + 1))}
        grid = write_grid(folder / "grid.yaml", data, axes, ["vip"], EPOCHS)
        timed_sweep(grid, folder / "out", [FEW_VIEWS])  # fills the bank
        seconds = [_again(grid, folder / "out", options) for options in ([], ["--pack"])]
    return _row(f"the whole sweep, {EPOCHS} epochs", *seconds) | {"floor_s": None}


def _again(grid: Path, out: Path, options: Sequence[str]) -> float:
    """Run a sweep's runs anew, its bank kept."""
    with atomic_directory(out.with_name("bank"), overwrite=True) as kept:
        (out / "runs" / ".bank").rename(kept / ".bank")
    fresh = out.with_name("again" + "".join(options))
    (fresh / "runs").mkdir(parents=True)
    (out.with_name("bank") / ".bank").rename(fresh / "runs" / ".bank")
    seconds = timed_sweep(grid, fresh, [*options, FEW_VIEWS])
    (fresh / "runs" / ".bank").rename(out / "runs" / ".bank")
    return seconds


def _row(what: str, apart: float, together: float) -> dict[str, Any]:
    return {"what": what, "apart_s": apart, "together_s": together, "ratio": apart / together}
