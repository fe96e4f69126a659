"""Start the commands of units as processes of this machine, and end them with all their children."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from vipbench.harness.system.console import RUNNER
from vipbench.harness.system.processes import available_cores
from vipbench.harness.system.signals import handled
from vipbench.sweeps.units import Unit

SECONDS_TO_STOP = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # besides Ctrl-C; a lost connection sends SIGHUP


def threads_each(processes: int) -> int:
    """The number of threads for each of so many processes, so that they share the cores."""
    return max(1, available_cores() // max(1, processes))


def start(unit: Unit, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a unit's command in a process group of its own, so that its children can be ended with it; it ends with us."""
    env = {**environment, RUNNER: str(os.getpid())}
    with unit.log.open("wb") as file:
        return subprocess.Popen(
            unit.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt, as Ctrl-C does, for signals that ask for an end; one that is ignored (nohup) stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with handled(caught, interrupt):
        yield


def stop(processes: Sequence["subprocess.Popen[bytes]"], seconds: float | None = None) -> None:
    """Ask processes to end, then kill their groups, after `seconds` or SECONDS_TO_STOP; a second Ctrl-C does not prevent it.

    Only the first process of a group is asked: a run whose loading processes end before it has failed rather than stopped.
    """
    with handled((signal.SIGINT, *STOP_SIGNALS), signal.SIG_IGN):
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + (SECONDS_TO_STOP if seconds is None else seconds)
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)  # also what a run that has ended left in its group
            process.wait()
