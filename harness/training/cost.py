"""The cost of a training: seconds and peak memory, over all sessions of a run that was interrupted."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from vipbench.harness.distributed.topology import Topology

STATUS = Path("/proc/self/status")  # of Linux


class Cost(BaseModel):
    """The cost of a training up to a point, as `Meter.state` gives it: seconds, and bytes at the peak."""

    model_config = ConfigDict(allow_inf_nan=False)

    seconds: NonNegativeFloat = 0.0
    peak_bytes: NonNegativeInt = 0


class Meter:
    """Measures what fitting a method takes, in seconds and in bytes at the peak.

    Seconds are those of the clock, without those in which the feature bank was filled, which runs share. The bytes are those that
    torch had allocated on the GPU since the meter was made, or the resident memory of the whole process since its start.

    Args:
        filling: seconds spent on the bank up to now.

    Attributes:
        seconds: of all intervals that have ended, in earlier sessions too, as far as a checkpoint holds them.
        earlier_peak: bytes, of earlier sessions.
    """

    def __init__(self, topology: Topology, filling: Callable[[], float] = lambda: 0.0) -> None:
        self.topology, self.filling = topology, filling
        self.seconds, self.earlier_peak = 0.0, 0
        self._began: float | None = None
        if topology.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(topology.device)

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self.seconds, self._began = self.elapsed(), None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def elapsed(self) -> float:
        """Seconds up to now."""
        return self.seconds + (0.0 if self._began is None else self._now() - self._began)

    def peak(self) -> int:
        """Bytes of the rank with the highest peak; all ranks call it together."""
        return int(max([self.earlier_peak, *self.topology.all_gather_objects([peak_bytes(self.topology.device)])]))

    def state(self) -> dict[str, Any]:
        """Collect what a checkpoint holds; all ranks call it together."""
        return {"seconds": self.elapsed(), "peak_bytes": self.peak()}

    def resume(self, cost: Cost) -> None:
        """Add an earlier session's `state`."""
        self.seconds += cost.seconds
        self.earlier_peak = max(self.earlier_peak, cost.peak_bytes)

    def _now(self) -> float:
        return time.monotonic() - self.filling()


def peak_bytes(device: torch.device) -> int:
    """The most memory that was allocated on a GPU, or, on a CPU, that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where it can be helped, which counts a parent's memory before this program was started, too.
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
