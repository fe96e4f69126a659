"""Copies between the host and the device that computes. Towers and engines keep what is on their device there; all else comes here."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. From pinned memory the copy does not wait for what the device is doing."""
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Values as float32 on the CPU, detached from any graph."""
    return values.detach().float().cpu()
