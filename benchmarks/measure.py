"""Take times, and the most that the machine could do."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from vipbench.harness.runs.provenance import machine, versions


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that does not count; a GPU is waited for."""
    run()
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def interleaved_seconds(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of several calls in turn, round by round, after a round that does not count.

    On a CPU they are those of the process, which other work on the machine touches least.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            synchronize()
            began = clock()
            step()
            synchronize()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(run: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products of a call; a multiplication and an addition are two."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused attention layer is one operation that is not counted
    with FlopCounterMode(display=False) as counter:
        run()
    torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def matrix_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """FLOP/s of a large matrix product here: the best of several, which is what a floor is computed from."""
    size = size or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(median_seconds(lambda: a @ b, 1) for _ in range(10))
    return 2 * size**3 / best


def context() -> dict[str, Any]:
    """The context of the figures: hardware, threads, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"machine": machine(), "device": device, "threads": torch.get_num_threads(), "versions": versions()}


@dataclass(frozen=True)
class Result:
    """The result of a benchmark: rows of equal columns, and notes that are needed to read them."""

    title: str
    rows: list[dict[str, Any]]
    notes: list[str]

    def show(self) -> None:
        """Print as a table."""
        table = Table(*(name.replace("_", " ") for name in self.rows[0]), title=self.title)
        for row in self.rows:
            table.add_row(*(_rounded(value) for value in row.values()))
        console = Console(highlight=False, markup=False)
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}")


def _rounded(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
