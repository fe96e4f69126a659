"""The executor `local`: units as processes of this machine, several at a time, each with a GPU of its own.

vipbench sweep run GRID --out DIR --jobs 4
vipbench sweep run GRID --out DIR --gpus 0,1,2,3
"""

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from pydantic import PositiveInt

from harness.system.console import RUNNER
from harness.system.progress import Progress
from sweeps.units import FAILED, LOGS, Executor, Unit, record_end

SECONDS_TO_STOP = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # besides Ctrl-C; a lost connection sends SIGHUP


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
        """Work through units; ends their processes before it returns for any reason."""
        for folder in (LOGS, FAILED):
            (out / folder).mkdir(exist_ok=True)
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
    environment = {"OMP_NUM_THREADS": str(threads(min(jobs, len(units)))), **os.environ}
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


def threads(processes: int) -> int:
    """How many threads each of so many processes may use, so that they share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, processes))


def start(unit: Unit, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a unit's command in a process group of its own, so that its children can be ended with it; it ends with us."""
    env = {**environment, RUNNER: str(os.getpid())}
    with unit.log.open("wb") as file:
        return subprocess.Popen(
            unit.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Let signals that ask us to end do what Ctrl-C does; one that is ignored (under nohup) stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(processes: Sequence["subprocess.Popen[bytes]"], seconds: float | None = None) -> None:
    """Ask processes to end, then make their groups, after `seconds` or SECONDS_TO_STOP; a second Ctrl-C does not keep us from it.

    Only the first process of a group is asked: a run whose loading processes end before it has failed rather than stopped.
    """
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + (SECONDS_TO_STOP if seconds is None else seconds)
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)  # also what a run that has ended left in its group
            process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
