"""The device that computes: which it is, how fp32 is rounded there, and copies between it and the host.

Towers and engines keep what is on their device there; all else comes here.
"""

import torch
from torch import Tensor

from harness.errors import UserError

NEEDS_CUDA = ("tf32", "fp16")


def choose_device(device: str = "auto", precision: str = "fp32", option: str = "run.device") -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda", and set for this process how fp32 is rounded on a GPU.

    fp32 is full fp32 unless `precision` is "tf32". cuDNN's own default is TF32 in convolutions, so that features of a patch
    embedding or a ResNet would be about 1e-3 from those of a CPU.

    Args:
        option: what the error calls the device.

    Raises:
        UserError: CUDA is asked for, or needed by the precision, and absent.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(f"{option}: no CUDA device is visible here; use cpu")
    chosen = "cuda" if available and device != "cpu" else "cpu"
    if chosen == "cpu" and precision in NEEDS_CUDA:
        raise UserError(f"precision: {precision} needs a GPU; use precision=bf16 or precision=fp32 on a CPU")
    # torch's older switches: they set the newer ones (fp32_precision) as well, whereas once those are set, reading the older ones
    # raises, and libraries read them.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return chosen


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. From pinned memory the copy does not wait for what the device is doing."""
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Values as float32 on the CPU, detached from any graph."""
    return values.detach().float().cpu()
