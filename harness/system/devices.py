"""The device that computes, how fp32 is rounded there, and copies between it and the host.

What the towers and engines hold stays where it is.
"""

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from vipbench.harness.errors import UserError

NEEDS_CUDA = ("tf32", "fp16")

Placed = TypeVar("Placed", bound=Tensor | nn.Module)


def choose_device(name: str, option: str = "run.device", precision: str = "fp32") -> torch.device:
    """The kind of device that "auto" (a GPU where there is one), "cpu" or "cuda" means here.

    Sets for this process how a GPU rounds fp32: not at all, unless `precision` is "tf32". cuDNN's own default is TF32 in
    convolutions, which moves what a patch embedding or a ResNet gives by about 1e-3.

    Args:
        option: where the name was given, for the error.

    Raises:
        UserError: CUDA is asked for, or needed by the precision, and absent; or the name is another one.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{option}: no device {name!r}; choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option}: no CUDA device is visible here; use {option}{'=' if '.' in option else ' '}cpu")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and precision in NEEDS_CUDA:
        raise UserError(f"precision: {precision} needs a GPU; use precision=bf16 or precision=fp32 on a CPU")
    # torch's older switches: they set the newer ones (fp32_precision) as well, whereas once those are set, reading the older ones
    # raises, and libraries read them.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def to_device(values: Placed, device: torch.device) -> Placed:
    """A tensor or a module on a device. A tensor goes through pinned memory, so that nobody waits for what a GPU is doing."""
    if device.type == "cuda" and isinstance(values, Tensor) and not values.is_cuda and not values.is_pinned():
        values = cast(Placed, values.pin_memory())
    return cast(Placed, values.to(device, non_blocking=True))


def to_host(values: Tensor) -> Tensor:
    """A tensor as float32 on the CPU, detached from any graph."""
    return values.detach().float().cpu()


def each_to_host(outputs: Iterable[Tensor]) -> Generator[Tensor]:
    """Outputs as `to_host` gives them, in their order. One of a GPU is copied, and used, while the next is computed.

    Where the outputs end in an exception, it is raised after the last of them was given out.
    """
    waiting: Callable[[], Tensor] | None = None
    try:
        for output in outputs:
            if not output.is_cuda:
                yield to_host(output)
                continue
            before, waiting = waiting, _begin_to_host(output)
            if before:
                yield before()
    except GeneratorExit:
        raise
    except BaseException:
        if waiting:
            yield waiting()
        raise
    if waiting:
        yield waiting()


def _begin_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin `to_host`; what it returns waits for the end."""
    copied, done = values.detach().float().to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copied

    return wait
