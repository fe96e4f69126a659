"""Copies between the host and the device that computes; what the towers and engines hold stays where they are."""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

Placed = TypeVar("Placed", bound=Tensor | nn.Module)


def to_device(values: Placed, device: torch.device) -> Placed:
    """A tensor or a module on a device. From pinned memory the copy does not wait for what the device is doing."""
    return cast(Placed, values.to(device, non_blocking=True))


def to_host(values: Tensor) -> Tensor:
    """A tensor as float32 on the CPU, detached from any graph."""
    return values.detach().float().cpu()
