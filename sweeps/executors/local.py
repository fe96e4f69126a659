"""The executor `local`: units as processes of this machine, several at a time, each with a GPU of its own.

vipbench sweep run GRID --out DIR --jobs 4
vipbench sweep run GRID --out DIR --gpus 0,1,2,3
"""

import contextlib
import os
import subprocess
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from vipbench.harness.system.progress import Progress
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.executors.processes import start, stop, stop_signals_interrupt, threads_each
from vipbench.sweeps.units import Unit, record_end


class LocalExecutor(Executor):
    """Units as processes of this machine.

    Attributes:
        jobs: processes at a time; None: one per GPU of `gpus`, or one.
        gpus: as CUDA_VISIBLE_DEVICES names them; each process sees the one that fewest others use. Empty: all see all.
    """

    kind: Literal["local"] = "local"
    jobs: PositiveInt | None = None
    gpus: tuple[str, ...] = ()

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Run units; ends their processes before it returns for any reason."""
        failures, runs = 0, sum(len(unit.names) for unit in units)
        ended = run_locally(units, self.jobs or len(self.gpus) or 1, self.gpus)
        with contextlib.closing(ended), Progress("sweep", runs, "runs") as progress:
            for unit, status in ended:
                failures += record_end(out, unit, status)
                progress.advance(len(unit.names), note=f"{failures} failed" if failures else None)


def run_locally(units: Sequence[Unit], jobs: int, gpus: Sequence[str] = ()) -> Generator[tuple[Unit, int], None, None]:
    """Run units as processes of this machine, `jobs` at a time; yields each with its exit status when it ends.

    Ends every process, with its children, before it returns for any reason; SIGTERM and SIGHUP are such reasons.
    """
    environment = {"OMP_NUM_THREADS": str(threads_each(min(jobs, len(units)))), **os.environ}
    waiting, running = deque(units), dict[Unit, subprocess.Popen[bytes]]()
    places: dict[Unit, str] = {}
    with stop_signals_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    unit = waiting.popleft()
                    if gpus:
                        used = Counter(places[other] for other in running)
                        places[unit] = min(gpus, key=lambda gpu: used[gpu])
                        environment["CUDA_VISIBLE_DEVICES"] = places[unit]
                    running[unit] = start(unit, environment)
                ended = [unit for unit, process in running.items() if process.poll() is not None]
                for unit in ended:
                    yield unit, running.pop(unit).returncode
                if not ended:
                    time.sleep(0.1)
        finally:
            stop(list(running.values()))
