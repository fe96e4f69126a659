"""Rank, world, device, precision and launcher: what knows of torchrun, accelerate and DeepSpeed, with harness/engines.py.

python harness/run.py CONFIG.yaml
torchrun --standalone --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch --multi_gpu --num_processes 2 harness/run.py CONFIG.yaml
accelerate launch --config_file harness/launch/deepspeed_8_gpus.yaml harness/run.py CONFIG.yaml

More in docs/distributed.md.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from harness.engines import USE_DEEPSPEED, Engine, PlainEngine, ZeroEngine, deepspeed_settings, zero_stage
from harness.errors import AnotherRankFailed, FirstToFail, UserError
from harness.signals import StopSignals

log = logging.getLogger(__name__)

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
SECONDS_TO_DROP_TENSORS = 0.3
FIRST_FAILURE = "vipbench/failure"  # in the store that the ranks share


class Topology:
    """The processes of this run, and what they do together.

    Args:
        device: "auto", "cpu" or "cuda". precision: "fp32", "bf16" or "fp16".
        timeout_minutes: after which a rank that waits for the others in vain gives up.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where this process computes.
        precision: "fp32", "bf16" or "fp16".
        launcher: "python", "torchrun" or "accelerate".
        zero_stage: DeepSpeed's stage 1, 2 or 3; 0 without DeepSpeed.
        sharded: whether weights lie in pieces on the ranks: a forward pass is then a thing that all ranks do together.
        signals: those that ask for an end; `each` heeds them between its passes.

    Raises:
        UserError: CUDA asked for and absent, fp16 on a CPU or under DeepSpeed, settings of DeepSpeed that do not fit, or fewer
            processes than the launcher announced.
    """

    def __init__(self, device: str, precision: str, timeout_minutes: float = 30) -> None:
        self.launcher = announced_launcher(os.environ)
        announced = announced_world(os.environ)
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("run.device: no CUDA device is visible here; use run.device=cpu")
        cpu = device == "cpu" or not torch.cuda.is_available()
        if cpu and precision == "fp16":
            raise UserError("precision: fp16 trains on a GPU only; use precision=bf16 or precision=fp32 on a CPU")
        self._deepspeed = deepspeed_settings(os.environ, cpu)
        self.zero_stage, self.sharded = zero_stage(self._deepspeed), False
        if self.zero_stage and precision == "fp16":
            raise UserError("precision: fp16 is not supported under DeepSpeed; use precision=bf16 or precision=fp32")
        self.signals = StopSignals(self.gather)
        self._timeout = timedelta(minutes=timeout_minutes)
        # Buffers are constants here; without this every step would send the frozen towers' to all ranks.
        handlers = [
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=self._timeout),
        ]
        with _without(USE_DEEPSPEED):  # under DeepSpeed on a CPU accelerate believes that there is one process
            self._accelerator = Accelerator(
                cpu=cpu, mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=handlers
            )
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

    def engine(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> Engine:
        """What trains a model here; its gradients become means over the ranks.

        Args:
            optimizer: of the parameters that require a gradient; its learning rates may be set between steps.
            max_norm: L2 norm over all gradients together that a step is scaled down to; None leaves them as they are.
        """
        if self._deepspeed is None:
            return PlainEngine(self._accelerator, model, optimizer, max_norm)
        engine = ZeroEngine(self, self._deepspeed, model, optimizer, max_norm, self._timeout)
        self.sharded = self.zero_stage == 3
        return engine

    def whole(self, parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        """While it is open parameters are whole on every rank; with `write` they become what rank 0 makes of them."""
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def passes(self, count: int, size: int) -> int:
        """In how many passes of `size` the rank with most of `count` items computes them."""
        return -(-len(range(count)[slice(0, count, self.world)]) // size)

    def each(
        self, forward: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], passes: int, shape: Sequence[int]
    ) -> Iterator[Tensor]:
        """`forward` of each of this rank's inputs, which are on its device.

        Where weights are sharded a rank with fewer inputs takes part in the others' passes, of which there are `passes`, with
        an input of zeros [1, *shape]. A signal is heeded after a pass, once its output has been taken.

        Raises:
            Stopped: a signal asked for an end.
        """
        self.signals.looks.restart()
        for batch in inputs:
            passes -= 1
            yield forward(batch)
            self.signals.heed()
        for _ in range(passes):
            if self.sharded:
                forward(torch.zeros(1, *shape, device=self.device))
            self.signals.heed()

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

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """All ranks end together, or fail for one reason: that of the rank which failed first.

        Raises:
            FirstToFail: instead of a user error, on the rank where it happened first.
            AnotherRankFailed: instead of what happened here, where it happened because another rank had failed.
        """
        try:
            yield
            self.gather([])  # a process that left before would end what the others still do with it
        except (FirstToFail, AnotherRankFailed):
            raise
        except Exception as error:
            log.debug("this rank stopped", exc_info=True)  # for the log of this rank
            if self.world == 1:
                raise
            lost = self._lost_contact(error)
            last = traceback.format_exception_only(error)[-1].strip()
            own = f"rank {self.rank}: {lost or (error if isinstance(error, UserError) else last)}"
            first = _claim(own)
            if first != own:
                raise AnotherRankFailed(first) from error
            if lost or isinstance(error, UserError):
                raise FirstToFail(own) from error
            raise

    def _lost_contact(self, error: Exception) -> str:
        """What an error of gloo means that came from other ranks' silence or end; "" for other errors."""
        if "timed out" in str(error).lower():
            minutes = self._timeout.total_seconds() / 60
            return f"another process did not answer for {minutes:g} minutes (run.timeout_minutes)"
        if any(text in str(error) for text in ("closed by peer", "reset by peer", "Broken pipe")):
            return "another process of this run ended without a word"
        return ""

    def close(self) -> None:
        """Leave the process group; another run of this process may then have another topology."""
        self._accelerator.end_training()
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
        devices = sorted(set(self.gather([name])))
        return {"launcher": self.launcher, "engine": engine, "processes": self.world, "devices": devices}


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


@contextmanager
def _without(variable: str) -> Iterator[None]:
    """An environment without a variable."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def _claim(failure: str) -> str:
    """Record why the run failed unless another rank has done so; returns what is on record."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set(FIRST_FAILURE, "", failure).decode()
    except (RuntimeError, ValueError):  # the rank that kept the store is gone
        return "another process of this run ended without a word"
