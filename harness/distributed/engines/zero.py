"""The engine of DeepSpeed's ZeRO 1, 2 and 3."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vipbench.harness.distributed.engines.optimizer_state import check_state
from vipbench.harness.distributed.failures import collective
from vipbench.harness.distributed.topology import Topology


def is_sharded(parameter: nn.Parameter) -> bool:
    """Check if ZeRO-3 holds a parameter in pieces on the ranks, as it does once its engine is made."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered_parameters(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Hold sharded parameters whole on every rank while it is open; with `write` they become what rank 0 makes of them."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with collective(), deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


class ZeroEngine:
    """DeepSpeed: optimizer states (ZeRO-1), gradients (2) and all weights, frozen ones too (3), in pieces on the ranks."""

    @collective()
    def __init__(
        self,
        topology: Topology,
        settings: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        read_in_pieces: tuple[type[nn.Module], ...],
        passes: int,
    ) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        self.topology, self.base = topology, optimizer
        # From stage 2 on a backward pass is a thing that all ranks do together.
        self.passes = passes if topology.zero_stage >= 2 else 1
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for module in model.modules():
            if isinstance(module, read_in_pieces):
                set_z3_leaf_module(module, True)
        deepspeed.utils.logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed, each step
        backend = "nccl" if topology.device.type == "cuda" else "gloo"
        if backend == "gloo":  # an all-reduce for inference, which DeepSpeed would compile for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=topology.timeout)
        sizes = {"train_batch_size": topology.world, "train_micro_batch_size_per_gpu": 1}  # only for its own statistics
        own = {"gradient_accumulation_steps": 1, "gradient_clipping": max_norm or 0.0}
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=_Autocast(model, topology), optimizer=optimizer, config={**settings, **sizes, **own, **allowed}
        )

    @collective()
    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        losses: list[Tensor] = []
        passes = max(self.passes, len(parts))
        for index in range(passes):
            self.engine.set_gradient_accumulation_boundary(index == passes - 1)
            spare = index >= len(parts)
            loss = self.engine(*parts[-1 if spare else index])
            self.engine.backward(loss * 0 if spare else loss)
            losses += [] if spare else [loss.detach()]
        self.engine.step()
        return torch.stack(losses).sum()

    @collective()
    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.topology.zero_stage < 3:
            # DeepSpeed links states to parameters once the first group had its first step, before other groups have any (0.19);
            # no public function of it links them again.
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        state: dict[str, Tensor] = {}
        for key, value in next(iter(self.base.state.values()), {}).items():
            for name, parameter in self.parameters.items():
                if value is not None:
                    whole = value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key)
                    state[f"{name}.{key}"] = whole.detach().cpu().clone()
        return state

    @collective()
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        check_state({name: getattr(own, "ds_shape", own.shape) for name, own in self.parameters.items()}, state)
        sharded = self.topology.zero_stage == 3
        for piece in self.zero.fp32_partitioned_groups_flat if sharded else self.zero.single_partition_of_fp32_groups:
            for entry, value in state.items():
                new = value.clone() if value.ndim == 0 else torch.zeros_like(piece)
                self.base.state[piece].setdefault(entry.rpartition(".")[2], new)
        if not sharded:  # as in `optimizer_state`
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

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        super().__init__()
        self.model, self.topology = model, topology

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.topology.autocast():
            return self.model(*inputs)
