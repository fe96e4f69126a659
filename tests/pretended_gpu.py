"""A GPU that is not there: whole runs in which every tensor has a device, and two devices that meet raise as CUDA does.

    with pretended_gpu():
        execute(config)            # with run.device=cuda

Tensors stay real and on the CPU, so runs execute and give numbers. A storage is marked when it is moved to "cuda" or made there,
and what is computed from it is marked too, in backward passes and optimisers as well, since this is seen at the level of ATen.
Where the host would wait for the GPU is counted: values read by Python, blocking copies, sizes that depend on values.
Not seen: CUDA's kernels and their rounding, autocast, streams, memory, NCCL, and waits inside of CUDA's own operators.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
MOVES = {"aten::copy_", "aten::_foreach_copy_", "aten::set_"}  # what may read one device and write the other
INDEXING = {
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
}  # indices may lie on the CPU
# Beside these, CUDA takes a CPU tensor without dimensions for a number.
NO_NUMBERS = {
    *("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::convolution", "aten::cat", "aten::stack"),
    *("aten::gather", "aten::scatter", "aten::index_select", "aten::embedding", "aten::nll_loss_forward"),
}
# The size of what these give, or what Python does next, depends on values on the GPU.
WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
}
PURGE_EVERY = 10_000  # storages
ROOT = Path(__file__).parents[1]


class Waits(Counter[str]):
    """The number of times that the host would have waited for the GPU, by what it did and the line of ours that did it."""

    def note(self, what: str) -> None:
        frame, here = sys._getframe(2), str(Path(__file__))
        while frame.f_back and (frame.f_code.co_filename == here or not _ours(frame.f_code.co_filename)):
            frame = frame.f_back
        self[f"{what}: {frame.f_code.co_filename.removeprefix(str(ROOT) + '/')}:{frame.f_lineno}"] += 1


def _ours(file: str) -> bool:
    return file.startswith(str(ROOT)) and "site-packages" not in file


class Marks:
    """The storages that lie on the pretended GPU."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps an address from being used again
        self.purge_at = PURGE_EVERY

    def __contains__(self, tensor: Tensor) -> bool:
        return _address(tensor) in self.storages

    def put(self, tensor: Tensor, on_gpu: bool) -> None:
        if not on_gpu:
            self.storages.pop(_address(tensor), None)
            return
        self.storages[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())
        if len(self.storages) > self.purge_at:
            self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
            self.purge_at = len(self.storages) + PURGE_EVERY


MARKS = Marks()  # of the whole process, since the code under test may cache what it put on a device


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Operators(TorchDispatchMode):
    """Every ATen call: refuses two devices, and marks what is computed on the GPU."""

    def __init__(self, marks: Marks, waits: Waits) -> None:
        super().__init__()
        self.marks, self.waits = marks, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in given if tensor in self.marks]
        name = func._schema.name
        if on_gpu and len(on_gpu) < len(given) and name not in MOVES:
            self._check(name, args, [tensor for tensor in given if tensor not in self.marks])
        if on_gpu and self._waits(name, args, kwargs or {}):
            self.waits.note(name)
        result = func(*args, **(kwargs or {}))
        if on_gpu and name not in MOVES:
            known = {_address(tensor) for tensor in given}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and _address(leaf) not in known:
                    self.marks.put(leaf, True)
        return result

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name == "aten::copy_":
            target, source = args[:2]
            host = source if target in self.marks else target
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            return (source in self.marks) != (target in self.marks) and not (free and is_pinned(host))
        if name in INDEXING:
            return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "aten::repeat_interleave":
            return kwargs.get("output_size") is None
        return name in WAITS

    def _check(self, name: str, args: Sequence[Any], on_cpu: Sequence[Tensor]) -> None:
        if name in INDEXING:
            values = [
                value for value in args[2:3] if isinstance(value, Tensor) and value.ndim and value not in self.marks
            ]
            if args[0] in self.marks and not values:
                return
        elif name not in NO_NUMBERS and all(tensor.ndim == 0 for tensor in on_cpu):
            return
        shapes = ", ".join(str(list(tensor.shape)) for tensor in on_cpu)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}; on the cpu: {shapes})"
        )


class Interface(TorchFunctionMode):
    """Devices as Python sees them: `.device`, moves, and tensors that are made on a device."""

    def __init__(self, marks: Marks, waits: Waits) -> None:
        super().__init__()
        self.marks, self.waits = marks, waits
        self.shown: dict[Any, Callable[[bool], Any]] = {
            torch.Tensor.device.__get__: lambda on_gpu: GPU if on_gpu else torch.device("cpu"),
            torch.Tensor.is_cuda.__get__: lambda on_gpu: on_gpu,  # type: ignore[attr-defined]
            torch.Tensor.is_cpu.__get__: lambda on_gpu: not on_gpu,  # type: ignore[attr-defined]
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.shown:
            return self.shown[func](args[0] in self.marks)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._move(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in self.marks:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func is Tensor.is_pinned:
            return is_pinned(args[0])
        if func is Tensor.tolist and args[0] in self.marks:
            self.waits.note("tolist")
        if kwargs.get("device") is None or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        made = func(*args, **{**kwargs, "device": "cpu"})
        if device.type == "cuda" and func in (torch.tensor, torch.as_tensor, torch.asarray) and made not in self.marks:
            self.waits.note("a tensor made of Python's numbers")
        self.marks.put(made, device.type == "cuda")
        return made

    def _move(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        tensor, *rest = args
        here, dtype = tensor in self.marks, tensor.dtype
        if func is not Tensor.to:
            there = func is Tensor.cuda
        elif isinstance(kwargs.get("other", rest[0] if rest else None), Tensor):
            other = kwargs.get("other", rest[0] if rest else None)
            there, dtype = other in self.marks, other.dtype
        else:
            named = {key: value for key, value in kwargs.items() if key != "copy" and value is not None}
            named.pop("memory_format", None)
            positional = [value for value in rest if not isinstance(value, bool)]
            device, asked, *_ = torch._C._nn._parse_to(*positional, **named)
            there, dtype = (device.type == "cuda" if device else here), asked or dtype
        moved = tensor.to(dtype)
        free = kwargs.get("non_blocking", False)
        if here != there and not (free and (here or is_pinned(tensor))):
            self.waits.note("a blocking copy")
        if here != there or kwargs.get("copy"):
            moved = moved.clone() if _address(moved) == _address(tensor) else moved
            self.marks.put(moved, there)
        return moved


def is_pinned(tensor: Tensor) -> bool:
    """Return True for a tensor on the CPU whose memory was pinned in here."""
    return "_pinned" in tensor.__dict__


def _pinned(tensor: Tensor) -> Tensor:
    tensor.__dict__["_pinned"] = True
    return tensor


@contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """Have torch find one GPU, and tensors keep to the device that they were put on; yields where the host waits for it.

    Raises (inside): RuntimeError where an operation reads two devices, TypeError where NumPy reads the GPU's memory.
    """
    found: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *args: "pretended GPU",
        "get_device_capability": lambda *args: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        found[name] = lambda *args, **kwargs: None
    found |= {"reset_peak_memory_stats": lambda *args: None, "max_memory_allocated": lambda *args: 0}
    found["Event"] = lambda *args, **kwargs: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    stream, waits = SimpleNamespace(is_capturing=lambda: False), Waits()
    with (
        mock.patch.multiple(torch.cuda, **found),
        # Pages are pinned, and graphs captured, by CUDA itself.
        mock.patch.multiple(torch.accelerator, is_available=lambda: False, current_device_index=lambda: 0),
        mock.patch.object(torch.accelerator, "current_stream", return_value=stream),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        warnings.catch_warnings(),
        Operators(MARKS, waits),
        Interface(MARKS, waits),
    ):
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield waits
