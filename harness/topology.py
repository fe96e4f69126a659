"""Rank, world, device, precision and launcher: the only file that knows of torchrun, accelerate and DeepSpeed.

python harness/run.py CONFIG.yaml
torchrun --standalone --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch --multi_gpu --num_processes 2 harness/run.py CONFIG.yaml
accelerate launch --config_file harness/launch/deepspeed.yaml harness/run.py CONFIG.yaml

More in docs/distributed.md.
"""

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from harness.errors import AnotherRankFailed, UserError

log = logging.getLogger(__name__)

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
FIRST_FAILURE = "vipbench/failure"  # in the store that the ranks share


class Engine(Protocol):
    """Trains a model whose forward pass is its loss, by steps that all ranks take together.

    Parameters are restored before an engine is made, its optimizer's state afterwards.
    """

    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """One optimiser step on a batch whose parts' losses add up; returns their sum on this rank (a scalar, detached).

        The gradient is the mean over the ranks, and it is clipped as a whole.
        """

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU by "<parameter>.<state>", the same for any number of ranks; all ranks call it together."""

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `optimizer_state` gave."""


class Topology:
    """The processes of this run, and what they do together.

    Args:
        device: "auto", "cpu" or "cuda". precision: "fp32", "bf16" or "fp16".
        timeout_minutes: after which a rank that waits for the others in vain gives up.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where this process computes.
        launcher: "python", "torchrun" or "accelerate".
        zero_stage: DeepSpeed's stage 1, 2 or 3; 0 without DeepSpeed.
        sharded: whether weights lie in pieces on the ranks: a forward pass is then a thing that all ranks do together.

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
        self._timeout = timedelta(minutes=timeout_minutes)
        # Buffers are constants here; without this every step would send the frozen towers' to all ranks.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=self._timeout)]
        with _without(USE_DEEPSPEED):  # under DeepSpeed on a CPU accelerate believes that there is one process
            self._accelerator = Accelerator(
                cpu=cpu, mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=handlers
            )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device
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
            return _PlainEngine(self._accelerator, model, optimizer, max_norm)
        engine = _ZeroEngine(self, self._deepspeed, model, optimizer, max_norm, self._timeout)
        self.sharded = self.zero_stage == 3
        return engine

    def whole(self, parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        """While it is open parameters are whole on every rank; with `write` they become what rank 0 makes of them."""
        if not self.sharded:
            return nullcontext()
        from deepspeed.zero import GatheredParameters

        return GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def passes(self, count: int, size: int) -> int:
        """In how many passes of `size` the rank with most of `count` items computes them."""
        return -(-len(range(count)[slice(0, count, self.world)]) // size)

    def each(
        self, forward: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], passes: int, shape: Sequence[int]
    ) -> Iterator[Tensor]:
        """`forward` of each of this rank's inputs.

        Where weights are sharded a rank with fewer inputs takes part in the others' passes, of which there are `passes`, with
        an input of zeros [1, *shape].
        """
        done = 0
        for done, batch in enumerate(inputs, 1):
            yield forward(batch.to(self.device))
        for _ in range(done, passes if self.sharded else 0):
            forward(torch.zeros(1, *shape, device=self.device))

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
        """All ranks fail for one reason: that of the rank which failed first.

        Raises:
            AnotherRankFailed: instead of what happened here, where it happened because another rank had failed.
        """
        try:
            yield
        except AnotherRankFailed:
            raise
        except Exception as error:
            log.debug("this rank stopped", exc_info=True)  # for the log of this rank
            if self.world == 1:
                raise
            last = traceback.format_exception_only(error)[-1].strip()
            own = f"rank {self.rank}: {error if isinstance(error, UserError) else last}"
            first = _claim(own)
            if first == own:
                if isinstance(error, UserError):
                    raise UserError(own) from error
                raise
            raise AnotherRankFailed(first) from error

    def close(self) -> None:
        """Leave the process group; another run of this process may then have another topology."""
        self._accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps device and precision per process

    def describe(self) -> dict[str, Any]:
        """Launcher, engine, processes and devices, for the run's provenance."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        engine = f"DeepSpeed ZeRO-{self.zero_stage}" if self.zero_stage else "DDP" if self.world > 1 else "one process"
        devices = sorted(set(self.gather([name])))
        return {"launcher": self.launcher, "engine": engine, "processes": self.world, "devices": devices}


class _PlainEngine:
    """One process, or distributed data parallel."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
    ) -> None:
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.accelerator, self.state, self.max_norm = accelerator, optimizer.state, max_norm
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch has a new name for it
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for part in parts:
            last = len(losses) == len(parts) - 1  # gradients go over the ranks once
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(*part)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        if self.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return torch.stack(losses).sum()

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value.detach().cpu().clone()
            for name, parameter in self.parameters.items()
            for key, value in self.state[parameter].items()
            if value is not None
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for entry, value in state.items():
            name, _, key = entry.rpartition(".")
            parameter = self.parameters[name]
            # Adam counts its steps on the CPU.
            self.state[parameter][key] = value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)


class _ZeroEngine:
    """DeepSpeed: optimizer states (ZeRO-1), gradients (2) and all weights, frozen ones too (3), in pieces on the ranks."""

    def __init__(
        self,
        topology: Topology,
        settings: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        timeout: timedelta,
    ) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        from harness.backbone import READ_IN_PIECES

        self.topology, self.base = topology, optimizer
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for module in model.modules():
            if isinstance(module, READ_IN_PIECES):
                set_z3_leaf_module(module, True)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        backend = "nccl" if topology.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        sizes = {"train_batch_size": topology.world, "train_micro_batch_size_per_gpu": 1}  # only for its own statistics
        own = {"gradient_accumulation_steps": 1, "gradient_clipping": max_norm or 0.0}
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**settings, **sizes, **own, **allowed}
        )

    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        losses: list[Tensor] = []
        passes = self._most(len(parts))
        for index in range(passes):
            self.engine.set_gradient_accumulation_boundary(index == passes - 1)
            spare = index >= len(parts)
            with self.topology.autocast():
                loss = self.engine(*parts[-1 if spare else index])
            self.engine.backward(loss * 0 if spare else loss)
            losses += [] if spare else [loss.detach()]
        self.engine.step()
        return torch.stack(losses).sum()

    def _most(self, passes: int) -> int:
        """The most passes of a rank: from stage 2 on each of them is a thing that all ranks do together."""
        if self.topology.world == 1 or self.topology.zero_stage < 2:
            return passes
        most = torch.tensor(passes, device=self.topology.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for key, value in next(iter(self.base.state.values()), {}).items():
            for name, parameter in self.parameters.items():
                if value is not None:
                    whole = value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key)
                    state[f"{name}.{key}"] = whole.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        pieces = self.zero.fp32_partitioned_groups_flat if self.topology.zero_stage == 3 else None
        pieces = pieces or self.zero.single_partition_of_fp32_groups
        for entry, value in state.items():
            key = entry.rpartition(".")[2]
            for piece in pieces:
                if value.ndim == 0:
                    self.base.state[piece][key] = value.clone()
                else:
                    self.base.state[piece].setdefault(key, torch.zeros_like(piece))
        if self.topology.zero_stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        for entry, value in state.items():
            name, _, key = entry.rpartition(".")
            if value.ndim > 0:
                parameter = self.parameters[name]
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


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


def deepspeed_settings(environment: Mapping[str, str], cpu: bool) -> dict[str, Any] | None:
    """DeepSpeed's settings as `accelerate launch` was given them, as a JSON file or as options; None without DeepSpeed.

    What the run's own config says (optimizer, schedule, precision, clipping, batch size) is left out, and so is "auto".

    Raises:
        UserError: DeepSpeed is not installed, or its settings name no stage from 1 to 3.
    """
    if environment.get(USE_DEEPSPEED, "false").lower() != "true":
        return None
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    try:
        import deepspeed  # noqa: F401
        from accelerate import DeepSpeedPlugin
    except ImportError as error:
        raise UserError("accelerate launch asks for DeepSpeed, which is not installed: pip install deepspeed") from error
    try:
        given = DeepSpeedPlugin(zero3_init_flag=False).hf_ds_config.config
    except (ValueError, OSError) as error:
        raise UserError(f"DeepSpeed's settings: {' '.join(str(error).split())}") from error
    for key in ("optimizer", "scheduler"):
        if key in given:
            log.warning("DeepSpeed's settings: %s is ignored, the run's config decides", key)
    ours = ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast")
    settings = _without_auto({key: value for key, value in given.items() if key not in ours})
    if zero_stage(settings) not in (1, 2, 3):
        raise UserError("DeepSpeed's settings: zero_optimization.stage must be 1, 2 or 3; without ZeRO leave DeepSpeed out")
    return settings


def zero_stage(settings: Mapping[str, Any] | None) -> int:
    return int((settings or {}).get("zero_optimization", {}).get("stage", 0))


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


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
        return "another process of this run ended"
