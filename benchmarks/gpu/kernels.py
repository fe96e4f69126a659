"""Measure what a call costs on a GPU: kernels, memory and synchronisations."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import synchronize

ROOT = Path(__file__).parents[2]


def issue_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call takes to be issued, with nobody waiting for the GPU in between.

    A call that takes no longer than that is bound by its launches.
    """
    call()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - began) / repeats
    synchronize()
    return seconds


def count_kernels(call: Callable[[], Any]) -> int | None:
    """Kernels and copies that a call launches; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronize()
    return sum(event.device_type.name == "CUDA" for event in found.events() or [])


def peak_mib(call: Callable[[], Any]) -> float | None:
    """The most memory that tensors take while a call runs, MiB, weights included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Count by the line of ours that caused it how often the host waits for the GPU; nothing is counted without one."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" not in str(message):
            return
        frame, last = sys._getframe(1), None
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(ROOT)) and "site-packages" not in frame.f_code.co_filename:
                last = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
                break
            frame = frame.f_back  # type: ignore[assignment]
        found[last or "a backward pass"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
