"""Work through a grid: each run its own process, several at a time, what is finished not run again.

    vipbench sweep run sweeps/few_shot.yaml --out DIR --jobs 2
    vipbench sweep status DIR

All state is files under DIR: sweep.json (the plan), configs/, runs/ (the run directories), logs/, failed/ (why a run failed).
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.errors import UserError
from harness.files import read_json, write_json, write_text
from harness.progress import Progress
from harness.results import is_finished, is_running

log = logging.getLogger(__name__)

PLAN, CONFIGS, RUNS, LOGS, FAILED = "sweep.json", "configs", "runs", "logs", "failed"
RUN_COMMAND = (sys.executable, str(Path(__file__).parents[1] / "harness" / "run.py"))
SECONDS_TO_STOP = 10.0

State = Literal["done", "failed", "running", "pending"]


class RunState(NamedTuple):
    """Where a planned run stands, and why it failed."""

    name: str
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A run to be started: its command, and the file that takes what it prints."""

    name: str
    command: tuple[str, ...]
    log: Path


def run_sweep(
    grid: Path, out: Path, jobs: int = 1, overrides: Sequence[str] = (), command: Sequence[str] = RUN_COMMAND
) -> list[RunState]:
    """Run what a grid plans and is not finished yet; returns where every planned run stands.

    Args:
        command: starts one run when a config file is added to it.

    Raises:
        UserError: the grid or what it names is wrong. A run that fails is recorded, and the rest go on.
    """
    names = plan(grid, out, overrides)
    missing = [name for name in names if not is_finished(out / RUNS / name)]
    log.info("%d runs, %d of them finished already", len(names), len(names) - len(missing))
    for folder in (LOGS, FAILED):
        (out / folder).mkdir(exist_ok=True)
    tasks = [
        Task(name, (*command, str(out / CONFIGS / f"{name}.yaml")), out / LOGS / f"{name}.log") for name in missing
    ]
    failures = 0
    with Progress("sweep", len(tasks), "runs") as progress:
        for task, status in run_locally(tasks, jobs):
            record = out / FAILED / f"{task.name}.json"
            if status == 0 and is_finished(out / RUNS / task.name):
                record.unlink(missing_ok=True)
            else:
                failures += 1
                write_json(record, {"error": last_line(task.log), "exit_status": status, "log": str(task.log)})
            progress.advance(note=f"{failures} failed" if failures else None)
    return sweep_status(out)


def plan(grid: Path, out: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write a grid's plan and configs under `out`; returns the names of its runs. Reads each backbone once, for its digest."""
    from harness.backbone import backbone_digest
    from harness.config import Digests, run_name
    from harness.data.shards import DatasetInfo
    from harness.symptoms.sets import SymptomSet
    from sweeps.grid import read_grid

    configs = read_grid(grid, [*overrides, f"run.out={out / RUNS}"])
    backbones = {config.backbone: "" for config in configs}
    for backbone in backbones:
        backbones[backbone] = backbone_digest(backbone)
    names: list[str] = []
    for config in configs:
        symptoms = SymptomSet.load(config.symptoms).digest() if config.symptoms else None
        digests = Digests(DatasetInfo.load(config.data.path).digest, backbones[config.backbone], symptoms)
        name = run_name(config, digests)
        if name not in names:
            names.append(name)
            write_text(out / CONFIGS / f"{name}.yaml", config.to_yaml())
    write_json(out / PLAN, {"grid": str(grid), "runs": names})
    return names


def sweep_status(out: Path) -> list[RunState]:
    """Where every planned run of a sweep stands, from its files alone.

    Raises:
        UserError: there is no sweep at `out`.
    """
    if not (out / PLAN).is_file():
        raise UserError(
            f"{out}: no sweep here (it has no {PLAN}); start one with `vipbench sweep run GRID --out {out}`"
        )
    return [_state(out, name) for name in read_json(out / PLAN)["runs"]]


def run_locally(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, int]]:
    """Run tasks as processes of this machine, `jobs` at a time; yields each with its exit status when it ends.

    Ends every process, with its children, before it returns for any reason; SIGTERM is such a reason.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    waiting, running = deque(tasks), dict[Task, subprocess.Popen[bytes]]()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                with task.log.open("wb") as file:
                    running[task] = subprocess.Popen(
                        task.command,
                        stdout=file,
                        stderr=file,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        start_new_session=True,
                    )
            ended = [task for task, process in running.items() if process.poll() is not None]
            for task in ended:
                yield task, running.pop(task).returncode
            if not ended:
                time.sleep(0.1)
    finally:
        _stop(list(running.values()))
        signal.signal(signal.SIGTERM, previous)


def last_line(path: Path) -> str:
    """The last line that is not empty of a log, without what a launcher adds around an error of ours."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    return (ours or lines or ["(it printed nothing)"])[-1]


def _state(out: Path, name: str) -> RunState:
    run, record = out / RUNS / name, out / FAILED / f"{name}.json"
    if is_finished(run):
        return RunState(name, "done")
    if is_running(run):
        return RunState(name, "running")
    if record.is_file():
        return RunState(name, "failed", read_json(record)["error"])
    return RunState(name, "pending")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ask process groups to end, then make them."""
    for number, patience in ((signal.SIGTERM, SECONDS_TO_STOP), (signal.SIGKILL, SECONDS_TO_STOP)):
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(0.05)
