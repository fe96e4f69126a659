"""Claims on the runs of a sweep, by which processes on any number of nodes share its units through the file system alone.

A claim is a file lock under DIR/claims/, held while a unit works. The system frees it when the process that holds it ends in
whatever way; another process then goes on with the unit from its checkpoint. The run itself holds the lock of its run directory
too, but only once it has loaded: the claim covers the time before that.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vipbench.harness.runs.directory import is_finished, is_running
from vipbench.harness.system.files import is_locked
from vipbench.sweeps.units import CLAIMS, FAILED, RUNS, Unit, record_end

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0


@contextmanager
def claimed(out: Path, names: Iterable[str]) -> Iterator[bool]:
    """Hold the claims on runs while the block lasts; yields False, and holds none, where another process has one of them."""
    with ExitStack() as held:
        try:
            for name in names:
                held.enter_context(FileLock(_claim(out, name), timeout=0))
            mine = True
        except Timeout:
            held.close()
            mine = False
        yield mine


def at_work(out: Path, name: str) -> bool:
    """Check for a process that works on a run, or has claimed it to start it."""
    return is_running(out / RUNS / name) or is_locked(_claim(out, name))


def _claim(out: Path, name: str) -> Path:
    return out / CLAIMS / f"{name}.lock"


def failure_times(out: Path, names: Iterable[str]) -> dict[str, int]:
    """Times (ns since 1970) at which runs were recorded as failed, by name; runs that have not failed are left out."""
    records = {name: out / FAILED / f"{name}.json" for name in names}
    return {name: record.stat().st_mtime_ns for name, record in records.items() if record.is_file()}


def work_through(
    out: Path,
    units: Sequence[Unit],
    run: Callable[[Unit], int],
    first: int = 0,
    before: Mapping[str, int] | None = None,
) -> None:
    """Run the units that no other process has claimed, one after the other, until all are over; waits for those of others.

    A unit is over when each of its runs is finished or has failed, and for the process that ran it however it ended.

    Args:
        run: runs a unit; returns its exit status.
        first: the place of the unit to begin with; processes that begin apart seldom try the same one.
        before: `failure_times` from before any process began; older failures are tried again.
    """
    left = deque(units)
    left.rotate(-first)
    passed = 0  # units in a row that could not be taken
    while left:
        unit = left.popleft()
        if _is_over(out, unit, before or {}):
            continue
        with claimed(out, unit.names) as mine:
            # An orphan may still be writing its checkpoint; and since we looked, another process may have ended the unit.
            if mine and not any(is_running(out / RUNS / name) for name in unit.names):
                if not _is_over(out, unit, before or {}):
                    record_end(out, unit, run(unit))
                passed = 0
                continue
        left.append(unit)
        passed += 1
        if passed == len(left):
            log.info("waiting for %d runs that other processes work on", sum(len(unit.names) for unit in left))
        if passed >= len(left):
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _is_over(out: Path, unit: Unit, before: Mapping[str, int]) -> bool:
    left = [name for name in unit.names if not is_finished(out / RUNS / name)]
    failed = failure_times(out, left)
    return all(name in failed and failed[name] != before.get(name) for name in left)
