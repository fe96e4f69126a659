"""Work through a grid: each run its own process, several at a time, what is finished not run again.

    vipbench sweep run sweeps/few_shot.yaml --out DIR --jobs 2
    vipbench sweep status DIR

All state is files under DIR: sweep.json (the plan), configs/, runs/ (the run directories), logs/, failed/ (why a run failed).
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from harness.errors import UserError
from harness.files import read_json, write_json, write_text
from harness.progress import Progress
from harness.results import failure, is_finished, is_running

log = logging.getLogger(__name__)

PLAN, CONFIGS, RUNS, LOGS, FAILED = "sweep.json", "configs", "runs", "logs", "failed"
HARNESS = Path(__file__).parents[1] / "harness"
RUN_COMMAND = (sys.executable, str(HARNESS / "run.py"))
PACK_COMMAND = (sys.executable, str(HARNESS / "pack.py"))
SECONDS_TO_STOP = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # besides Ctrl-C; a lost connection sends SIGHUP

State = Literal["done", "failed", "running", "pending"]


class RunState(NamedTuple):
    """Where a planned run stands, and why it failed."""

    name: str
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A process to be started for a run, or for several that train together: its command, and the file for what it prints."""

    names: tuple[str, ...]
    command: tuple[str, ...]
    log: Path


def run_sweep(
    grid: Path,
    out: Path,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    command: Sequence[str] = RUN_COMMAND,
    pack: bool = False,
) -> list[RunState]:
    """Run what a grid plans and is not finished yet; returns where every planned run stands.

    Args:
        pack: train runs together that differ only in seed, shots or learning rate.
        command: starts one run when a config file is added to it.

    Raises:
        UserError: the grid or what it names is wrong, or another process works on this sweep. A run that fails is
            recorded, and the rest go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{out}: another process is working on this sweep; see `vipbench sweep status {out}`"
        ) from error
    with lock:
        names = plan(grid, out, overrides)
        missing = [name for name in names if not is_finished(out / RUNS / name)]
        log.info("%d of them are finished already", len(names) - len(missing))
        _run_all(out, _tasks(out, missing, command, pack), jobs)
    return sweep_status(out)


def _tasks(out: Path, names: Sequence[str], command: Sequence[str], pack: bool) -> list[Task]:
    from harness.config import Config
    from sweeps.packing import group

    files = {name: out / CONFIGS / f"{name}.yaml" for name in names}
    groups = group({name: Config.load(file) for name, file in files.items()}) if pack else [[name] for name in names]
    tasks = []
    for members in groups:
        start = command if len(members) == 1 else PACK_COMMAND
        log_file = out / LOGS / f"{members[0]}.log"
        tasks.append(Task(tuple(members), (*start, *(str(files[name]) for name in members)), log_file))
    return tasks


def _run_all(out: Path, tasks: Sequence[Task], jobs: int) -> None:
    for folder in (LOGS, FAILED):
        (out / folder).mkdir(exist_ok=True)
    failures = 0
    runs = sum(len(task.names) for task in tasks)
    with contextlib.closing(run_locally(tasks, jobs)) as ended, Progress("sweep", runs, "runs") as progress:
        for task, status in ended:
            for name in task.names:
                record = out / FAILED / f"{name}.json"
                if is_finished(out / RUNS / name):
                    record.unlink(missing_ok=True)
                else:
                    failures += 1
                    error = failure(out / RUNS / name) or why(status, task.log)
                    write_json(record, {"error": error, "exit_status": status, "log": str(task.log)})
            progress.advance(len(task.names), note=f"{failures} failed" if failures else None)


def plan(grid: Path, out: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write a grid's plan and configs under `out`; returns the names of its runs, each once. Loads each backbone once."""
    from harness.backbone import backbone_digest
    from harness.config import Config, Digests, run_name
    from harness.data.shards import DatasetInfo
    from harness.symptoms.sets import SymptomSet
    from sweeps.grid import read_grid

    configs = read_grid(
        grid, [*overrides, f"run.out={json.dumps(str(out / RUNS), ensure_ascii=False)}"]
    )  # quoted: overrides are YAML
    datasets = {path: DatasetInfo.load(path).digest for path in {config.data.path for config in configs}}
    symptoms = {path: SymptomSet.load(path).digest() for path in {config.symptoms for config in configs} if path}
    backbones = {backbone: backbone_digest(backbone) for backbone in dict.fromkeys(c.backbone for c in configs)}
    runs: dict[str, Config] = {}
    for config in configs:
        symptoms_digest = symptoms[config.symptoms] if config.symptoms else None
        digests = Digests(datasets[config.data.path], backbones[config.backbone], symptoms_digest)
        runs.setdefault(run_name(config, digests), config)
    for name, config in runs.items():
        write_text(out / CONFIGS / f"{name}.yaml", config.to_yaml())
    write_json(out / PLAN, {"grid": str(grid), "runs": list(runs)})
    log.info("%d combinations are %d different runs", len(configs), len(runs))
    return list(runs)


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


def run_locally(tasks: Sequence[Task], jobs: int) -> Generator[tuple[Task, int], None, None]:
    """Run tasks as processes of this machine, `jobs` at a time; yields each with its exit status when it ends.

    Ends every process, with its children, before it returns for any reason; SIGTERM and SIGHUP are such reasons.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(1, min(jobs, len(tasks))))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    waiting, running = deque(tasks), dict[Task, subprocess.Popen[bytes]]()
    with _stop_signals_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.popleft()
                    running[task] = _start(task, environment)
                ended = [task for task, process in running.items() if process.poll() is not None]
                for task in ended:
                    yield task, running.pop(task).returncode
                if not ended:
                    time.sleep(0.1)
        finally:
            _stop(list(running.values()))


def why(status: int, log_file: Path) -> str:
    """Why a run that left no result ended, in one line: what it said last, and how it ended where that says more."""
    line = last_line(log_file)
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; it said last: {line}"
    if status == 0:
        return f"it ended without an error but left no run directory of this name; it said last: {line}"
    return line


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


def _start(task: Task, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with task.log.open("wb") as file:
        return subprocess.Popen(
            task.command,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # its children are of its process group, so that they can be ended with it
        )


@contextlib.contextmanager
def _stop_signals_interrupt() -> Iterator[None]:
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


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ask process groups to end, then make them; a second Ctrl-C does not keep us from it."""
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            _signal_group(process, signal.SIGKILL)  # also what a run that has ended left in its group
            process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, number)
