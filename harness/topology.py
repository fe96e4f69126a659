"""Rank, world, device, precision and launcher: the only file that knows of torchrun, accelerate and DeepSpeed.

python harness/run.py CONFIG.yaml
torchrun --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch --multi_gpu --num_processes 2 harness/run.py CONFIG.yaml
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from harness.errors import UserError

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Topology:
    """The processes of this run, and what they do together.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where this process computes.
        precision: "fp32", "bf16" or "fp16".
        launcher: "python", "torchrun" or "accelerate".

    Raises:
        UserError: CUDA asked for and absent, fp16 on a CPU, or fewer processes than the launcher announced.
    """

    def __init__(self, device: str, precision: str) -> None:
        self.launcher = announced_launcher(os.environ)
        announced = announced_world(os.environ)
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("run.device: no CUDA device is visible here; use run.device=cpu")
        cpu = device == "cpu" or not torch.cuda.is_available()
        if cpu and precision == "fp16":
            raise UserError("precision: fp16 trains on a GPU only; use precision=bf16 or precision=fp32 on a CPU")
        # Buffers are constants here; without this every step would send the frozen towers' to all ranks.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self._accelerator = Accelerator(cpu=cpu, mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=handlers)
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device, self.precision = self._accelerator.device, precision
        if self.world != announced:
            raise UserError(
                f"{self.launcher} announced {announced} processes, but {self.world} found each other; "
                f"start them with torchrun --nproc-per-node {announced} harness/run.py ..."
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` items are this rank's: every world-th."""
        return slice(self.rank, count, self.world)

    def engine(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> "Engine":
        """What trains a model here; its gradients become means over the ranks."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch has a new name for it
            model, optimizer = self._accelerator.prepare(model, optimizer)
        return Engine(self._accelerator, model, optimizer, max_norm)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision as configured, for what runs outside a prepared model."""
        return self._accelerator.autocast()

    def gather(self, items: Iterable[Any]) -> list[Any]:
        """All ranks' items in rank order, on every rank. The items are our own Python objects."""
        return list(gather_object(list(items))) if self.world > 1 else list(items)

    def sum(self, value: Tensor) -> float:
        """Sum of a scalar over the ranks."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return float(value)

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """Leave the process group; another run of this process may then have another topology."""
        self._accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps device and precision per process

    def describe(self) -> dict[str, Any]:
        """Launcher, processes and devices, for the run's provenance."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"launcher": self.launcher, "processes": self.world, "devices": sorted(set(self.gather([name])))}


class Engine:
    """Trains a model whose forward pass is its loss, by steps that all ranks take together.

    Args:
        model, optimizer: as prepared by accelerate.
        max_norm: L2 norm over all gradients together that a step is scaled down to; None leaves them as they are.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float | None) -> None:
        self._accelerator, self.model, self.optimizer, self.max_norm = accelerator, model, optimizer, max_norm

    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """One optimiser step on a batch whose parts' losses add up; returns their sum on this rank (a scalar, detached)."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for part in parts:
            last = len(losses) == len(parts) - 1  # gradients go over the ranks once
            with nullcontext() if last else self._accelerator.no_sync(self.model):
                loss = self.model(*part)
                self._accelerator.backward(loss)
            losses.append(loss.detach())
        if self.max_norm is not None:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return torch.stack(losses).sum()


def announced_launcher(environment: Mapping[str, str]) -> str:
    """Who started this process, from the variables that launchers set."""
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "python"


def announced_world(environment: Mapping[str, str]) -> int:
    """How many processes the launcher says there are.

    Raises:
        UserError: WORLD_SIZE without a launcher, or `accelerate launch --num_processes N` without `--multi_gpu`, which starts
            one process and says nothing.
    """
    if "WORLD_SIZE" in environment:
        world = int(environment["WORLD_SIZE"])
        if world > 1 and "MASTER_ADDR" not in environment:
            raise UserError(
                f"WORLD_SIZE says {world} processes, but no launcher started them; use torchrun, or unset WORLD_SIZE"
            )
        return world
    # accelerate's simple launcher sets an address only when several processes were asked for, yet starts one.
    if announced_launcher(environment) == "accelerate" and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch was asked for several processes, but on this machine it started one; "
            "use torchrun --nproc-per-node N harness/run.py ... or accelerate launch --multi_gpu"
        )
    return 1
