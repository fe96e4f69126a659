"""The processes of a run: rank, world, device and precision, and the collectives among them.

python harness/run.py CONFIG.yaml
torchrun --standalone --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch --multi_gpu --num_processes 2 harness/run.py CONFIG.yaml
accelerate launch --config_file harness/launch/deepspeed_8_gpus.yaml harness/run.py CONFIG.yaml

More in docs/distributed.md.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor

from vipbench.harness.distributed.failures import collective, fail_together
from vipbench.harness.distributed.launcher import (
    USE_DEEPSPEED,
    announced_launcher,
    announced_world,
    deepspeed_settings,
    refuse_unsupported,
    without,
    zero_stage,
)
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.signals import StopSignals

MIXED_PRECISION = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}
SECONDS_TO_DROP_TENSORS = 0.3


class Topology:
    """The processes of this run, and what they do together.

    Args:
        device: "auto", "cpu" or "cuda". precision: "fp32", "tf32", "bf16" or "fp16".
        timeout_minutes: after which a rank that waits for the others in vain gives up.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where this process computes.
        precision: "fp32", "tf32", "bf16" or "fp16".
        launcher: "python", "torchrun" or "accelerate".
        zero_stage: DeepSpeed's stage 1, 2 or 3; 0 without DeepSpeed.
        deepspeed: DeepSpeed's settings; None without DeepSpeed.
        accelerator: accelerate's object, for the engines.
        timeout: of collectives.
        signals: those that ask for an end; `map_batches` acts on them between its passes.

    Raises:
        UserError: CUDA asked for and absent, tf32 or fp16 on a CPU, fp16 under DeepSpeed, settings of DeepSpeed that do not fit,
            something of accelerate's that is not supported, or fewer processes than the launcher announced.
    """

    def __init__(self, device: str, precision: str, timeout_minutes: float = 30) -> None:
        refuse_unsupported(os.environ)
        self.launcher = announced_launcher(os.environ)
        announced = announced_world(os.environ)
        cpu = choose_device(device, precision=precision).type == "cpu"
        self.deepspeed = deepspeed_settings(os.environ, cpu)
        self.zero_stage = zero_stage(self.deepspeed)
        if self.zero_stage and precision == "fp16":
            raise UserError("precision: fp16 is not supported under DeepSpeed; use precision=bf16 or precision=fp32")
        self.signals = StopSignals(self.all_gather_objects)
        self.timeout = timedelta(minutes=timeout_minutes)
        # Buffers are constants here; without this every step would send the frozen towers' to all ranks.
        handlers = [
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=self.timeout),
        ]
        with without(USE_DEEPSPEED):  # under DeepSpeed on a CPU accelerate believes that there is one process
            try:
                self.accelerator = Accelerator(
                    cpu=cpu, mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=handlers
                )
            except dist.DistError as error:
                reason = shortened(" ".join(str(error).split()), 200)
                raise UserError(f"{self.launcher}: {announced} processes did not find each other: {reason}") from error
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.precision = self.accelerator.device, precision
        if self.world != announced:
            raise UserError(
                f"{self.launcher} announced {announced} processes, but {self.world} found each other; "
                f"start them with torchrun --nproc-per-node {announced} harness/run.py ..."
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Slice `count` items to the share of this rank: every world-th."""
        return slice(self.rank, count, self.world)

    def passes(self, count: int, size: int) -> int:
        """Count the passes of `size` in which the rank with most of `count` items computes them."""
        return -(-len(range(count)[slice(0, count, self.world)]) // size)

    def map_batches(
        self,
        forward: Callable[[Tensor], Tensor],
        inputs: Iterable[Tensor],
        passes: int,
        shape: Sequence[int],
        sharded: bool,
    ) -> Iterator[Tensor]:
        """`forward` of each of this rank's inputs, which are on its device.

        A signal is acted on after a pass, once its output has been taken.

        Args:
            passes: of the rank with most inputs.
            sharded: weights lie in pieces on the ranks, so that a pass is a thing that all ranks do together; a rank with fewer
                inputs then takes part in the others' passes with zeros [1, *shape].

        Raises:
            Stopped: a signal asked for an end.
        """
        together = collective()(forward)
        self.signals.exchange.restart()
        for batch in inputs:
            passes -= 1
            yield together(batch)
            self.signals.stop_if_asked()
        for _ in range(passes):
            if sharded:
                together(torch.zeros(1, *shape, device=self.device))
            self.signals.stop_if_asked()

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision as configured, for what runs outside a prepared model."""
        return self.accelerator.autocast()

    def all_gather_objects(self, items: Iterable[Any]) -> list[Any]:
        """All ranks' items in rank order, on every rank. The items are our own Python objects."""
        own = list(items)
        if self.world == 1:
            return own
        with collective():
            return list(gather_object(own))

    def all_gather_rows(self, rows: Tensor, most: int) -> Tensor:
        """Every rank's rows [n, ...] as [world, most, ...], on every rank and on its device; after a rank's rows stand zeros.

        Args:
            most: rows of the rank that has most.
        """
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        if self.world == 1:
            return padded[None]
        found = [torch.empty_like(padded) for _ in range(self.world)]
        with collective():
            dist.all_gather(found, padded)
        return torch.stack(found)

    def all_reduce_sum(self, value: Tensor) -> float:
        """Sum of a scalar over the ranks."""
        value = value.detach().clone()
        if self.world > 1:
            with collective():
                dist.all_reduce(value)
        return float(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the ranks, on every rank; `value` is overwritten."""
        if self.world > 1:
            with collective():
                dist.all_reduce(value)
        return value / self.world

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        if self.world > 1:
            with collective():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    def fail_together(self) -> AbstractContextManager[None]:
        """End on all ranks together, or fail on all for one reason; see `vipbench.harness.distributed.failures.fail_together`."""
        return fail_together(self.rank, self.world, self.timeout, self.all_gather_objects)

    def close(self) -> None:
        """Leave the process group; another run of this process may then have another topology."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.zero_stage and self.device.type == "cpu":
            # DeepSpeed keeps gloo's threads, which take Python's lock to drop their last tensors, and abort where Python ended.
            time.sleep(SECONDS_TO_DROP_TENSORS)
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps device and precision per process

    def describe(self) -> dict[str, Any]:
        """Launcher, engine, processes and devices, for the run's provenance."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        engine = "DDP" if self.world > 1 else "one process"
        if self.zero_stage:
            engine = f"DeepSpeed {version('deepspeed')} ZeRO-{self.zero_stage}"
        devices = sorted(set(self.all_gather_objects([name])))
        return {"launcher": self.launcher, "engine": engine, "processes": self.world, "devices": devices}
