"""Make what takes a training step: accelerate's data parallelism, or DeepSpeed's ZeRO, as the launcher asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vipbench.harness.distributed.engines.ddp import PlainEngine
from vipbench.harness.distributed.engines.zero import ZeroEngine
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError

Combine = Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]]


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


def make_engine(
    topology: Topology,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None = None,
    read_in_pieces: tuple[type[nn.Module], ...] = (),
    combine: Combine | None = None,
    passes: int = 1,
    cuda_graph: bool = False,
) -> Engine:
    """The engine that trains a model here; gradients become means over the ranks.

    Args:
        model: its forward pass gives the loss of a part: a scalar, or with `combine` one loss [K] for each of K gradients.
        optimizer: of the parameters that require a gradient; its learning rates may be set between steps.
        max_norm: L2 norm over all gradients together that a step is scaled down to; None leaves them as they are.
        read_in_pieces: kinds of modules whose weights are read without calling the modules that hold them, so that ZeRO-3 has
            to gather such a module as one.
        combine: makes one gradient of K gradients of the global batch, each by parameter name.
        passes: the parts in a step of the rank that has most of them.
        cuda_graph: whether the passes of a step are captured once and replayed.

    Raises:
        UserError: `combine` under DeepSpeed, which reduces gradients on its own; or a CUDA graph of a step that cannot be one.
    """
    if cuda_graph and (reason := _no_graph(topology, combine, passes)):
        raise UserError(f"run.cuda_graph: {reason}; leave it out")
    if topology.deepspeed is None:
        return PlainEngine(topology, model, optimizer, max_norm, combine, cuda_graph)
    if combine:
        raise UserError(
            f"DeepSpeed's ZeRO-{topology.zero_stage} reduces one gradient, but this method combines several; "
            "use accelerate launch --multi_gpu"
        )
    return ZeroEngine(topology, topology.deepspeed, model, optimizer, max_norm, read_in_pieces, passes)


def _no_graph(topology: Topology, combine: Combine | None, passes: int) -> str:
    """The reason why the passes of a step are no CUDA graph; "" where they may be one."""
    if topology.device.type != "cuda":
        return "it needs a GPU"
    if topology.world > 1 or topology.deepspeed is not None:
        return "it is for one process without DeepSpeed"
    if combine is not None:
        return "this method combines several gradients"
    return "with run.micro_batch a step is several passes" if passes > 1 else ""
