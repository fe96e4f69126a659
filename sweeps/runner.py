"""Run a grid: plan it and have its missing runs run here, over an allocation, or as jobs of a cluster.

    vipbench sweep run sweeps/few_shot.yaml --out DIR --jobs 2
    vipbench sweep status DIR

All state is files under DIR: sweep.json (the plans), configs/, runs/ (the run directories), logs/, failed/ (reasons of failures),
claims/ (locks of the units at work), launch.json (the executor, for `retry`), jobs/ (submissions to Slurm) and damaged/ (finished
runs that were damaged since, and run again).
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError
from vipbench.harness.runs.directory import is_finished
from vipbench.harness.system.files import disk_errors, read_json, write_json
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.executors.claims import at_work
from vipbench.sweeps.executors.in_process import InProcessExecutor
from vipbench.sweeps.executors.local import LocalExecutor
from vipbench.sweeps.executors.slurm import SlurmExecutor
from vipbench.sweeps.executors.submissions import job_states
from vipbench.sweeps.executors.torchrun import TorchrunExecutor
from vipbench.sweeps.plan import plan_units, planned, write_plan
from vipbench.sweeps.status import RunState, quick_damage, sweep_status
from vipbench.sweeps.units import CLAIMS, CONFIGS, DAMAGED, FAILED, JOBS, LOCK, LOGS, RUN_COMMAND, RUNS, Unit

log = logging.getLogger(__name__)

LAUNCH, EARLIER_LAUNCH = "launch.json", "how.json"  # the latter in sweeps of earlier versions
SECONDS_TO_PLAN = 1800.0  # that the other nodes of an allocation wait for one that plans
SECONDS_TO_END = 30.0  # for runs whose runner was killed, to end at a checkpoint


AnyExecutor = Annotated[
    LocalExecutor | InProcessExecutor | TorchrunExecutor | SlurmExecutor, Field(discriminator="kind")
]


class LaunchRecord(Section):
    """The way in which a sweep was run last."""

    executor: AnyExecutor
    pack: bool

    @classmethod
    def read(cls, out: Path) -> "LaunchRecord":
        """Read the record of a sweep. Raises UserError where there is none, or a damaged one."""
        for path in (out / LAUNCH, out / EARLIER_LAUNCH):
            if path.is_file():
                return validate(cls, read_json(path), where=str(path))
        raise UserError(f"{out}: nothing was planned here yet; give the same `vipbench sweep run` again")


def run_sweep(
    grid: Path,
    out: Path,
    executor: Executor | None = None,
    overrides: Sequence[str] = (),
    command: Sequence[str] = RUN_COMMAND,
    pack: bool = False,
    plugins: Sequence[Path] = (),
) -> list[RunState]:
    """Run the runs of a grid that are neither finished nor at work; returns the states of all runs of this grid.

    Args:
        executor: None: this machine, one run at a time.
        pack: train runs together that differ only in seed, shots or learning rate.
        command: starts one run when a config file is added to it; the processes of torchrun start RUN_COMMAND instead.
        plugins: Python files that register methods, for every run.

    Raises:
        UserError: the grid or what it names is wrong, `out` cannot be written, or another process works on this sweep. A run
            that fails is recorded, and the rest go on.
    """
    executor = executor or LocalExecutor()
    names: list[str] = []

    def missing() -> list[Unit]:
        names.extend(write_plan(grid, out, overrides, plugins))
        write_json(out / LAUNCH, {"executor": executor.model_dump(mode="json"), "pack": pack})
        return plan_units(out, _missing(out, names), command, pack)

    _work(out, executor, missing)
    return sweep_status(out, names)


def retry(out: Path, only_failed: bool, command: Sequence[str] = RUN_COMMAND) -> list[RunState]:
    """Run the missing runs of a sweep, or those that failed, in the way it was run last; returns the states of all its runs.

    Raises:
        UserError: there is no sweep at `out`, nothing of it was planned yet, or another process works on it.
    """
    names = planned(out)
    launch = LaunchRecord.read(out)

    def missing() -> list[Unit]:
        failed = {state.name for state in sweep_status(out) if state.state in ("failed", "damaged")}
        wanted = [name for name in _missing(out, names) if name in failed or not only_failed]
        return plan_units(out, wanted, command, launch.pack)

    _work(out, launch.executor, missing)
    return sweep_status(out)


def _work(out: Path, executor: Executor, find: Callable[[], list[Unit]]) -> None:
    """Find the units to run of a sweep and run them; other commands may work on it too where the executor shares it with them."""
    with disk_errors(out):
        with _locked(out, executor):
            units = find()
            if executor.exclusive and units:
                executor.run(out, units)
        if not executor.exclusive:  # also for nothing: the other nodes wait to meet this one
            executor.run(out, units)


@contextmanager
def _locked(out: Path, executor: Executor) -> Iterator[None]:
    """Keep other processes off a sweep, and make its folders.

    Raises:
        UserError: a process is at work that this executor cannot share it with, or the folders cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK).acquire(timeout=0 if executor.exclusive else SECONDS_TO_PLAN)
    except Timeout as error:
        raise UserError(
            f"{out}: another process is working on this sweep; see `vipbench sweep status {out}`"
        ) from error
    except OSError as error:
        raise _not_writable(out, error) from error
    with lock:
        try:
            for folder in (CONFIGS, RUNS, LOGS, FAILED, CLAIMS, JOBS):
                (out / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(out, error) from error
        yield


def _not_writable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: {error.filename or out}: {error.strerror}; give a folder that can be written")


def _missing(out: Path, names: Sequence[str]) -> list[str]:
    """Planned runs that are neither finished, nor a cluster's job that waits or runs, nor at work in another process here."""
    _set_aside_damaged(out, names)
    left = [name for name in names if not is_finished(out / RUNS / name)]
    submitted = {name for name, job in job_states(out / JOBS).items() if job.active}
    missing = [name for name in left if name not in submitted]
    log.info("%d of them are finished already", len(names) - len(left))
    if len(missing) < len(left):
        log.info("%d of them are jobs already, waiting or running", len(left) - len(missing))
    busy = _busy(out, missing)
    if busy:
        log.warning("%d of them are at work in other processes: not started again", len(busy))
    return [name for name in missing if name not in busy]


def _set_aside_damaged(out: Path, names: Sequence[str]) -> None:
    """Move finished runs that were damaged since to DIR/damaged/, so that they are missing from here on."""
    for name in names:
        run, kept = out / RUNS / name, out / DAMAGED / name
        damage = quick_damage(run) if is_finished(run) else None
        if damage:
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            run.rename(kept)
            log.warning("%s; the run is moved to %s and run again", damage, kept)


def _busy(out: Path, names: Sequence[str]) -> set[str]:
    """Runs that other processes work on, after a while in which those that a killed runner left end by themselves."""
    deadline = time.monotonic() + SECONDS_TO_END
    busy = {name for name in names if at_work(out, name)}
    if busy:
        log.info("%d of them are at work in other processes; waiting for their end", len(busy))
    while busy and time.monotonic() < deadline:
        time.sleep(0.5)
        busy = {name for name in busy if at_work(out, name)}
    return busy
