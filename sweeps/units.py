"""Units: the runs that one process, or one launch of several, works on (one, or several that train together), and their ends."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vipbench.harness.runs.directory import failure, is_finished, is_running
from vipbench.harness.system.console import INTERRUPTED
from vipbench.harness.system.files import write_json

# Names in the folder of a sweep, explained in sweeps/runner.py.
PLAN, CONFIGS, RUNS, LOGS, FAILED, CLAIMS, JOBS, DAMAGED = (
    "sweep.json",
    "configs",
    "runs",
    "logs",
    "failed",
    "claims",
    "jobs",
    "damaged",
)
LOCK = ".lock"
HARNESS = Path(__file__).parents[1] / "harness"
RUN_COMMAND = (sys.executable, str(HARNESS / "run.py"))
PACK_COMMAND = (sys.executable, str(HARNESS / "pack.py"))
# Status of a run that stopped at a checkpoint, as it was asked to.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
BLOCK = 1 << 16  # bytes
NOT_FAILED = (*STOPPED, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)  # the latter two: asked before it could listen

# Of runs and of Slurm jobs, as read from a file; they become names of files and folders.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]


@dataclass(frozen=True)
class Unit:
    """A command to be started for runs (several: they train together), and the file for its output."""

    names: tuple[str, ...]
    command: tuple[str, ...]
    log: Path


def unit(out: Path, names: Sequence[str], command: Sequence[str] = RUN_COMMAND) -> Unit:
    """The unit of planned runs of the sweep at `out`.

    Args:
        command: starts a run that is alone; several are started by PACK_COMMAND.
    """
    start = command if len(names) == 1 else PACK_COMMAND
    files = (str(out / CONFIGS / f"{name}.yaml") for name in names)
    return Unit(tuple(names), (*start, *files), out / LOGS / f"{names[0]}.log")


def record_end(out: Path, unit: Unit, status: int, reason: str | None = None) -> int:
    """Record which runs of a unit failed and why, after its command ended with `status`; returns how many.

    One that was asked to end, or that another process is working on, has not failed, unless a `reason` is given.
    """
    failures = 0
    for name in unit.names:
        record = out / FAILED / f"{name}.json"
        if is_finished(out / RUNS / name):
            record.unlink(missing_ok=True)
        elif reason or not (status in NOT_FAILED or is_running(out / RUNS / name)):
            failures += 1
            error = reason or failure(out / RUNS / name) or failure_reason(status, unit.log)
            write_json(record, {"error": error, "exit_status": status, "log": str(unit.log)})
    return failures


def failure_reason(status: int, log_file: Path) -> str:
    """The reason why a run that left no result ended, in one line: its last output, and its end where that tells more."""
    line = last_line(log_file)
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; it said last: {line}"
    if status == 0:
        return f"it ended without an error but left no run directory of this name; it said last: {line}"
    return line


def end_of(path: Path) -> bytes:
    """The last 64 KiB of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - BLOCK))
        return file.read(BLOCK)


def last_line(path: Path) -> str:
    """The last line that is not empty of a log, without the lines that a launcher adds around an error of ours."""
    text = end_of(path).decode("utf-8", "replace") if path.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    return (ours or lines or ["(it printed nothing)"])[-1]
