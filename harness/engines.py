"""What takes a training step: one process or distributed data parallel through accelerate, or DeepSpeed's ZeRO 1, 2 and 3.

`Topology.engine` makes the one that the launcher asked for. Beside harness/topology.py this is the only file that knows of them.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from harness.errors import LostContact, UserError

if TYPE_CHECKING:
    from harness.topology import Topology

log = logging.getLogger(__name__)

USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
SCALER = "loss scale"  # of fp16, in an optimizer's state
OF_GLOO = re.compile(
    r"\[\S*gloo/\S+:\d+\] "
)  # its errors are plain RuntimeErrors that begin with a place in its source


@contextmanager
def collective() -> Iterator[None]:
    """Do something that all ranks do together; also a decorator.

    Raises:
        LostContact: torch.distributed or gloo report that another rank is silent or gone. Other errors stay what they are.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not OF_GLOO.match(str(error)):
            raise
        raise LostContact(silent=bool(re.search("timed out|timeout", str(error), re.IGNORECASE))) from error


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


class PlainEngine:
    """One process, or distributed data parallel."""

    @collective()
    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
    ) -> None:
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.accelerator, self.base, self.max_norm = accelerator, optimizer, max_norm  # accelerate replaces its state
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch has a new name for it
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @collective()
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
        scaler = self.accelerator.scaler
        scale = {f"{SCALER}.{key}": torch.tensor(value) for key, value in scaler.state_dict().items()} if scaler else {}
        return {**read_state(self.base, self.parameters), **scale}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        scale = {key.removeprefix(f"{SCALER}."): value for key, value in state.items() if key.startswith(f"{SCALER}.")}
        if scale:
            self.accelerator.scaler.load_state_dict({key: value.item() for key, value in scale.items()})
        write_state(self.base, self.parameters, {key: state[key] for key in state if not key.startswith(f"{SCALER}.")})


class ZeroEngine:
    """DeepSpeed: optimizer states (ZeRO-1), gradients (2) and all weights, frozen ones too (3), in pieces on the ranks."""

    @collective()
    def __init__(
        self,
        topology: "Topology",
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
        deepspeed.utils.logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed, each step
        backend = "nccl" if topology.device.type == "cuda" else "gloo"
        if backend == "gloo":  # an all-reduce for inference, which DeepSpeed would compile for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        sizes = {"train_batch_size": topology.world, "train_micro_batch_size_per_gpu": 1}  # only for its own statistics
        own = {"gradient_accumulation_steps": 1, "gradient_clipping": max_norm or 0.0}
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=_Autocast(model, topology), optimizer=optimizer, config={**settings, **sizes, **own, **allowed}
        )

    @collective()
    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        losses: list[Tensor] = []
        passes = self._most(len(parts))
        for index in range(passes):
            self.engine.set_gradient_accumulation_boundary(index == passes - 1)
            spare = index >= len(parts)
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

    @collective()
    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for key, value in next(iter(self.base.state.values()), {}).items():
            for name, parameter in self.parameters.items():
                if value is not None:
                    whole = value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key)
                    state[f"{name}.{key}"] = whole.detach().cpu().clone()
        return state

    @collective()
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        sharded = self.topology.zero_stage == 3
        for piece in self.zero.fp32_partitioned_groups_flat if sharded else self.zero.single_partition_of_fp32_groups:
            for entry, value in state.items():
                new = value.clone() if value.ndim == 0 else torch.zeros_like(piece)
                self.base.state[piece].setdefault(entry.rpartition(".")[2], new)
        if not sharded:
            self.zero._lazy_init_hp_params_optimizer_state()
        for entry, value in state.items():
            name, _, key = entry.rpartition(".")
            if value.ndim > 0:
                self._set(self.parameters[name], key, value)

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Put a whole tensor into the pieces of an optimizer's state."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.topology.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
            return
        # DeepSpeed's own function for whole tensors fails where they do not divide by the ranks (0.19).
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.topology.world - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(size)[self.topology.rank], key)


class _Autocast(nn.Module):
    """A model in mixed precision, inside of what DeepSpeed wraps, because it ends an autocast from outside."""

    def __init__(self, model: nn.Module, topology: "Topology") -> None:
        super().__init__()
        self.model, self.topology = model, topology

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.topology.autocast():
            return self.model(*inputs)


def read_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy on the CPU of an optimizer's state of named parameters, by "<parameter>.<state>"."""
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }


def write_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put into an optimizer what `read_state` gave."""
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        parameter = parameters[name]
        # Adam counts its steps on the CPU.
        optimizer.state[parameter][key] = value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)


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
        raise UserError(
            "accelerate launch asks for DeepSpeed, which is not installed: pip install deepspeed"
        ) from error
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
        raise UserError(
            "DeepSpeed's settings: zero_optimization.stage must be 1, 2 or 3; without ZeRO leave DeepSpeed out"
        )
    return settings


def zero_stage(settings: Mapping[str, Any] | None) -> int:
    return int((settings or {}).get("zero_optimization", {}).get("stage", 0))


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
