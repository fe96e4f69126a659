"""States of the runs of a sweep, from files and, where they were submitted, from Slurm. No process of ours is asked."""

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.runs.directory import (
    CANDIDATES,
    CONFIG,
    PARTIAL,
    STEPS,
    failure,
    find_damage,
    is_finished,
    is_running,
    log_file,
)
from vipbench.harness.system.files import read_json, read_yaml
from vipbench.harness.training.schedule import total_steps
from vipbench.sweeps.executors.submissions import WAITING, JobState, job_states
from vipbench.sweeps.plan import planned
from vipbench.sweeps.units import FAILED, JOBS, LOGS, RUNS, end_of, last_line

log = logging.getLogger(__name__)

ENDED = {
    "TIMEOUT": "ran out of time before it could go back into the queue (--time)",
    "OUT_OF_MEMORY": "out of memory (--mem)",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "preempted",
    "DEADLINE": "missed its deadline",
}

State = Literal["done", "failed", "running", "pending", "damaged"]
SMALL_FILE = 1 << 20  # bytes; the content of larger files of finished runs is not checked here


class RunState(NamedTuple):
    """The state of a planned run, its reason (of failing or waiting) or progress, and whether it is a job in Slurm's queue."""

    name: str
    state: State
    reason: str = ""
    queued: bool = False


def sweep_status(out: Path, names: Sequence[str] | None = None) -> list[RunState]:
    """The states of runs of a sweep; None: of all that were ever planned there.

    Raises:
        UserError: there is no sweep at `out`.
    """
    names = planned(out) if names is None else names
    try:
        submitted = job_states(out / JOBS)
    except UserError as error:
        log.warning("%s; what follows is from files alone", error)
        submitted = {}
    return [_state_or_damage(out, name, submitted.get(name)) for name in names]


def _state_or_damage(out: Path, name: str, job: JobState | None) -> RunState:
    """The state of a run, or "failed" with the file that cannot be read as the reason, so that the other runs are shown."""
    try:
        return _state(out, name, job)
    except UserError as error:  # names the file
        return RunState(name, "failed", f"damaged: {error}")
    except (OSError, LookupError, TypeError) as error:
        return RunState(name, "failed", f"damaged: {out / RUNS / name}: {error!r}")


def _state(out: Path, name: str, job: JobState | None) -> RunState:
    run = out / RUNS / name
    if is_finished(run):
        if damage := quick_damage(run):
            return RunState(name, "damaged", f"{damage}; `vipbench sweep retry` runs it again")
        return RunState(name, "done")
    if job and job.state in WAITING:
        why = job.reason if job.reason not in ("", "None") else job.state
        return RunState(name, "pending", f"in the queue ({why})", queued=True)
    queued = bool(job and job.active)
    if queued or is_running(run):
        return RunState(name, "running", progress(run.with_name(run.name + PARTIAL)), queued)
    record = out / FAILED / f"{name}.json"
    reason = _recorded(record) if record.is_file() else failure(run)
    if job and job.state in ENDED:
        return RunState(name, "failed", f"{ENDED[job.state]}; {reason or _last_output(out, name)}")
    if reason:
        return RunState(name, "failed", reason)
    if job and job.state != "CANCELLED":
        ended = f"ended ({job.state})" if job.state else "is gone from Slurm's queue"
        return RunState(name, "failed", f"its job {job.job} {ended} and left no reason; {_last_output(out, name)}")
    return RunState(name, "pending", "cancelled" if job else "")


def quick_damage(run: Path) -> str | None:
    """The damage of a finished run in one line, as far as its small files show it, so that thousands are checked in seconds."""
    return find_damage(run, SMALL_FILE)


def _recorded(record: Path) -> str:
    content = read_json(record)
    if not isinstance(content, dict) or "error" not in content:
        raise UserError(f"{record}: should hold why the run failed; found {shortened(content)}")
    return str(content["error"])


def _last_output(out: Path, name: str) -> str:
    return f"it said last: {last_line(out / LOGS / f'{name}.log')}"


def progress(partial: Path) -> str:
    """The steps that a run at work has done and about how long it will still train, from its log of steps and its files' times.

    The rate is that since the run was started or went on, its set-up included.
    """
    try:
        step = _last_step(partial / STEPS)
        config = read_yaml(partial / CONFIG)
        if config.get("grid"):  # the chosen candidate, which is trained
            return "testing"
        steps = _steps(config) if config["train"] else None
        began, now = ((partial / file).stat().st_mtime for file in (CONFIG, STEPS))
    except (OSError, ValueError, LookupError, TypeError) as error:
        if (
            not (partial / STEPS).is_file() or not (partial / CONFIG).is_file()
        ):  # it is starting, tunes, or has just ended
            begun = len(list((partial / CANDIDATES).glob("*")))
            return f"candidate {begun} of its grid" if begun else ""
        return f"how far it is cannot be read: {shortened(' '.join(str(error).split()), 200)}"
    if steps is None or step is None:
        return ""
    if step >= steps:
        return f"step {step} of {steps}, testing"
    first = _resumed_after(log_file(partial, 0))
    rate = (step - first) / max(now - began, 1e-3)
    left = f", about {timedelta(seconds=round((steps - step) / rate))} left" if rate > 0 else ""
    return f"step {step} of {steps}{left}"


def _last_step(path: Path) -> int | None:
    found = re.findall(rb'"step": (\d+)[^\n]*\n', end_of(path))
    return int(found[-1]) if found else None


def _resumed_after(path: Path) -> int:
    found = re.findall(rb"goes on after step (\d+) of", end_of(path)) if path.is_file() else []
    return int(found[-1]) if found else 0


def _steps(config: Mapping[str, Any]) -> int:
    """The optimiser steps that a resolved config plans."""
    train, shots = TrainConfig(**config["train"]), config["data"]["shots"]
    classes, images = _dataset(config["data"]["path"])
    samples = images if shots == "all" else shots * classes
    return total_steps(train, samples)


@cache
def _dataset(path: str) -> tuple[int, int]:
    from vipbench.harness.data.info import DatasetInfo

    info = DatasetInfo.load(path)
    return len(info.classes), sum(info.splits["train"].counts.values())
