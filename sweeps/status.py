"""Plans of a sweep and the state of each run: from files and, where it was submitted, from Slurm. No process of ours
is asked.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.config.schema import TrainConfig
from harness.config.validation import Section
from harness.errors import UserError, shortened
from harness.runs.directory import CONFIG, PARTIAL, STEPS, failure, is_finished, is_running
from harness.system.files import read_json, read_yaml
from harness.training.schedule import total_steps
from sweeps.grid import validated
from sweeps.jobs import JOBS, WAITING, Entry, entries
from sweeps.units import FAILED, LOCK, LOGS, PLAN, RUNS, end_of, last_line

log = logging.getLogger(__name__)

ENDED = {
    "TIMEOUT": "ran out of time before it could go back into the queue (--time)",
    "OUT_OF_MEMORY": "out of memory (--mem)",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "preempted",
    "DEADLINE": "missed its deadline",
}

State = Literal["done", "failed", "running", "pending"]


class Plan(Section):
    """The runs, each once, that a grid came to."""

    grid: str = ""
    runs: tuple[str, ...]


class RunState(NamedTuple):
    """Where a planned run stands, what is to be said of it (why it failed or waits, how far it is), and whether it is a job."""

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
        submitted = entries(out / JOBS)
    except UserError as error:
        log.warning("%s; what follows is from files alone", error)
        submitted = {}
    return [_state_or_damage(out, name, submitted.get(name)) for name in names]


def planned(out: Path) -> list[str]:
    """The names of all runs that were ever planned for a sweep; none where its planning was interrupted.

    Raises:
        UserError: there is no sweep, or its plan is damaged.
    """
    if not (out / PLAN).is_file() and not (out / LOCK).is_file():
        raise UserError(
            f"{out}: no sweep here (it has no {PLAN}); start one with `vipbench sweep run GRID --out {out}`"
        )
    return list(dict.fromkeys(name for plan in plans(out) for name in plan.runs))


def plans(out: Path) -> list[Plan]:
    """The plans of a sweep, the oldest first. Raises UserError where their file is damaged."""
    path = out / PLAN
    if not path.is_file():
        return []
    content = read_json(path)
    found = content.get("plans", [content]) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(plan, dict) for plan in found):
        raise UserError(f"{path}: should hold plans; found {shortened(content)}")
    return [validated(Plan, plan, str(path)) for plan in found]


def _state_or_damage(out: Path, name: str, entry: Entry | None) -> RunState:
    """The state of a run; what cannot be read of it is the reason, and the other runs are shown all the same."""
    try:
        return _state(out, name, entry)
    except UserError as error:  # names the file
        return RunState(name, "failed", f"damaged: {error}")
    except (OSError, LookupError, TypeError) as error:
        return RunState(name, "failed", f"damaged: {out / RUNS / name}: {error!r}")


def _state(out: Path, name: str, entry: Entry | None) -> RunState:
    run = out / RUNS / name
    if is_finished(run):
        return RunState(name, "done")
    if entry and entry.state in WAITING:
        why = entry.reason if entry.reason not in ("", "None") else entry.state
        return RunState(name, "pending", f"in the queue ({why})", queued=True)
    queued = bool(entry and entry.active)
    if queued or is_running(run):
        return RunState(name, "running", progress(run.with_name(run.name + PARTIAL)), queued)
    record = out / FAILED / f"{name}.json"
    reason = _recorded(record) if record.is_file() else failure(run)
    if entry and entry.state in ENDED:
        return RunState(name, "failed", f"{ENDED[entry.state]}; {reason or _said_last(out, name)}")
    if reason:
        return RunState(name, "failed", reason)
    if entry and entry.state != "CANCELLED":
        ended = f"ended ({entry.state})" if entry.state else "is gone from Slurm's queue"
        return RunState(name, "failed", f"its job {entry.job} {ended} and left no reason; {_said_last(out, name)}")
    return RunState(name, "pending", "cancelled" if entry else "")


def _recorded(record: Path) -> str:
    content = read_json(record)
    if not isinstance(content, dict) or "error" not in content:
        raise UserError(f"{record}: should hold why the run failed; found {shortened(content)}")
    return str(content["error"])


def _said_last(out: Path, name: str) -> str:
    return f"it said last: {last_line(out / LOGS / f'{name}.log')}"


def progress(partial: Path) -> str:
    """How far a run at work has come, and about how long it will still train: from its log of steps and the times of its files.

    The rate is that since the run was started or went on, its set-up included.
    """
    try:
        step = _last_step(partial / STEPS)
        config = read_yaml(partial / CONFIG)
        steps = _steps(config) if config["train"] else None
        began, now = ((partial / file).stat().st_mtime for file in (CONFIG, STEPS))
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not (partial / STEPS).is_file() or not (partial / CONFIG).is_file():  # it is starting, or has just ended
            return ""
        return f"how far it is cannot be read: {shortened(' '.join(str(error).split()), 200)}"
    if steps is None or step is None:
        return ""
    if step >= steps:
        return f"step {step} of {steps}, testing"
    first = _resumed_after(partial / LOGS / "rank-0.log")
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
    from harness.data.info import DatasetInfo

    info = DatasetInfo.load(path)
    return len(info.classes), sum(info.splits["train"].counts.values())
