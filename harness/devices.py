"""The device that computes, and copies between it and the host; what the towers and engines hold stays where they are."""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from harness.errors import UserError

Placed = TypeVar("Placed", bound=Tensor | nn.Module)


def choose_device(name: str, option: str = "run.device") -> torch.device:
    """The kind of device that "auto" (a GPU where there is one), "cpu" or "cuda" means here.

    Args:
        option: where the name was given, for the error.

    Raises:
        UserError: CUDA is asked for and absent, or the name is another one.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{option}: no device {name!r}; choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option}: no CUDA device is visible here; use {option}{'=' if '.' in option else ' '}cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def to_device(values: Placed, device: torch.device) -> Placed:
    """A tensor or a module on a device. From pinned memory the copy does not wait for what the device is doing."""
    return cast(Placed, values.to(device, non_blocking=True))


def to_host(values: Tensor) -> Tensor:
    """A tensor as float32 on the CPU, detached from any graph."""
    return values.detach().float().cpu()
