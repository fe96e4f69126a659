"""The training steps of several runs, one after the other and together in one pass of the text tower (`sweep run --pack`)."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.kernels import peak_mib
from benchmarks.gpu.setting import Row, Setting, Workspace, workspace
from benchmarks.measure import median_seconds
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class
from vipbench.harness.training.packing import RandomStream, compute_together


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """A row for each method that can be packed, but those whose step is more than a loss and its gradient."""
    with workspace(setting, precision, begin) as place:
        for name in setting.trained():
            cls = method_class(name)
            if cls.combine is not Method.combine or cls.statistics is not Method.statistics:
                continue
            if not cls.not_packed(place.job(name).config.method):
                yield place.attempt({"method": name, "precision": place.precision}, partial(_row, place, setting, name))


def _row(place: Workspace, setting: Setting, name: str) -> Row:
    trainings = [place.job(name, seed).training for seed in range(1, setting.runs + 1)]
    losses = []
    for training in trainings:
        assert training is not None
        (part,) = training.parts(next(training.batches()), None)
        losses.append(partial(training.loss, *part))
    optimizers = [training.optimizer for training in trainings if training]

    def step(*runs: int) -> None:
        """Take a step of some runs in one pass."""
        with place.topology.autocast():
            computations = [losses[run] for run in runs]
            found = compute_together(place.inputs.backbone.text, computations, [RandomStream() for _ in runs])
        torch.stack(found).sum().backward()
        for run in runs:
            optimizers[run].step()
            optimizers[run].zero_grad(set_to_none=True)

    def apart() -> None:
        for run in range(setting.runs):
            step(run)

    def together() -> None:
        step(*range(setting.runs))

    one, many = median_seconds(apart, setting.repeats), median_seconds(together, setting.repeats)
    found = {"runs": setting.runs, "apart_ms": 1e3 * one, "together_ms": 1e3 * many, "ratio": one / many}
    return found | {"peak_mib": peak_mib(together)}
