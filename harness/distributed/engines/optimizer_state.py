"""The state of an optimizer as named tensors on the CPU, which is how checkpoints hold it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
