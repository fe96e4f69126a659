"""The state of an optimizer as named tensors on the CPU, which is how checkpoints hold it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vipbench.harness.errors import UserError, shortened


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
    """Put into an optimizer what `read_state` gave. Raises UserError where it is not that of these parameters."""
    check_state({name: parameter.shape for name, parameter in parameters.items()}, state)
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        parameter = parameters[name]
        # Adam counts its steps on the CPU.
        optimizer.state[parameter][key] = value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)


def check_state(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> None:
    """Raise UserError where an optimizer's state, by "<parameter>.<state>", is not that of parameters of these shapes.

    Of each parameter that has any there must be the same: scalars, and tensors of its shape.
    """
    found: dict[str, set[str]] = {}
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        if name not in shapes or (value.ndim and tuple(value.shape) != tuple(shapes[name])):
            own = shortened(f"{entry} {list(value.shape)}")
            raise UserError(f"checkpoint: damaged: {own} is no optimizer's state of this training's parameters")
        found.setdefault(name, set()).add(key)
    if len({frozenset(keys) for keys in found.values()}) > 1:
        raise UserError("checkpoint: damaged: the optimizer's state of some parameter is not whole")
