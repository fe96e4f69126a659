"""Plan a grid and have what is missing of it run: here, over an allocation, or as jobs of a cluster.

    vipbench sweep run sweeps/few_shot.yaml --out DIR --jobs 2
    vipbench sweep status DIR

All state is files under DIR: sweep.json (the plans), configs/, runs/ (the run directories), logs/, failed/ (why a run failed),
how.json (which executor, for `retry`) and jobs/ (what was submitted to Slurm).
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field

from harness.config.validation import Section
from harness.errors import UserError
from harness.runs.directory import is_finished, is_running
from harness.runs.resolve import load_config
from harness.system.files import disk_errors, read_json, write_json, write_text
from sweeps.grid import validated
from sweeps.jobs import JOBS, entries
from sweeps.local import LocalExecutor
from sweeps.ranks import TorchrunExecutor
from sweeps.slurm import SlurmExecutor
from sweeps.status import Plan, RunState, planned, plans, sweep_status
from sweeps.units import CONFIGS, FAILED, LOCK, LOGS, PLAN, RUN_COMMAND, RUNS, Executor, Unit, unit

log = logging.getLogger(__name__)

HOW = "how.json"
SECONDS_TO_PLAN = 1800.0  # that the other nodes of an allocation wait for one that plans
SECONDS_TO_END = 30.0  # for runs whose runner was killed, to end at a checkpoint


class How(Section):
    """How a sweep was run last."""

    executor: Annotated[LocalExecutor | TorchrunExecutor | SlurmExecutor, Field(discriminator="kind")]
    pack: bool


def run_sweep(
    grid: Path,
    out: Path,
    executor: Executor | None = None,
    overrides: Sequence[str] = (),
    command: Sequence[str] = RUN_COMMAND,
    pack: bool = False,
    plugins: Sequence[Path] = (),
) -> list[RunState]:
    """Run what a grid plans and is neither finished nor at work; returns where each run of this grid stands.

    Args:
        executor: what runs it; None: this machine, one run at a time.
        pack: train runs together that differ only in seed, shots or learning rate.
        command: starts one run when a config file is added to it.
        plugins: Python files that register methods, for every run.

    Raises:
        UserError: the grid or what it names is wrong, `out` cannot be written, or another process works on this sweep. A run
            that fails is recorded, and the rest go on.
    """
    executor = executor or LocalExecutor()
    names: list[str] = []

    def missing() -> list[Unit]:
        names.extend(plan(grid, out, overrides, plugins))
        write_json(out / HOW, {"executor": executor.model_dump(mode="json"), "pack": pack})
        return _units(out, _missing(out, names), command, pack)

    _work(out, executor, missing)
    return sweep_status(out, names)


def retry(out: Path, only_failed: bool, command: Sequence[str] = RUN_COMMAND) -> list[RunState]:
    """Run what is missing of a sweep, or what failed of it, in the way it was run last; returns where every planned run stands.

    Raises:
        UserError: there is no sweep at `out`, nothing of it was planned yet, or another process works on it.
    """
    names = planned(out)
    if not (out / HOW).is_file():
        raise UserError(f"{out}: nothing was planned here yet; give the same `vipbench sweep run` again")
    how = validated(How, read_json(out / HOW), str(out / HOW))

    def missing() -> list[Unit]:
        failed = {state.name for state in sweep_status(out) if state.state == "failed"}
        wanted = [name for name in _missing(out, names) if name in failed or not only_failed]
        return _units(out, wanted, command, how.pack)

    _work(out, how.executor, missing)
    return sweep_status(out)


def _work(out: Path, executor: Executor, find: Callable[[], list[Unit]]) -> None:
    """Find what there is to do on a sweep and do it, together with other commands only where the executor is made for that."""
    with disk_errors(out):
        with _locked(out, executor):
            units = find()
            if executor.alone:
                executor.run(out, units)
        if not executor.alone:
            executor.run(out, units)


@contextmanager
def _locked(out: Path, executor: Executor) -> Iterator[None]:
    """Keep other processes off a sweep, and make its folders.

    Raises:
        UserError: a process is at work that this executor cannot share it with, or the folders cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK).acquire(timeout=0 if executor.alone else SECONDS_TO_PLAN)
    except Timeout as error:
        raise UserError(
            f"{out}: another process is working on this sweep; see `vipbench sweep status {out}`"
        ) from error
    except OSError as error:
        raise _not_writable(out, error) from error
    with lock:
        try:
            for folder in (CONFIGS, RUNS, LOGS, FAILED, JOBS):
                (out / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(out, error) from error
        yield


def _not_writable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: {error.filename or out}: {error.strerror}; give a folder that can be written")


def _missing(out: Path, names: Sequence[str]) -> list[str]:
    """Planned runs that are neither finished, nor a cluster's job that waits or runs, nor at work in another process here."""
    left = [name for name in names if not is_finished(out / RUNS / name)]
    submitted = {name for name, entry in entries(out / JOBS).items() if entry.active}
    missing = [name for name in left if name not in submitted]
    log.info("%d of them are finished already", len(names) - len(left))
    if len(missing) < len(left):
        log.info("%d of them are jobs already, waiting or running", len(left) - len(missing))
    busy = _at_work(out, missing)
    if busy:
        log.warning("%d of them are at work in other processes: not started again", len(busy))
    return [name for name in missing if name not in busy]


def _at_work(out: Path, names: Sequence[str]) -> set[str]:
    """Runs that other processes are working on, after a while in which those that a killed runner left end by themselves."""
    deadline = time.monotonic() + SECONDS_TO_END
    busy = {name for name in names if is_running(out / RUNS / name)}
    if busy:
        log.info("%d of them are at work in other processes; waiting for their end", len(busy))
    while busy and time.monotonic() < deadline:
        time.sleep(0.5)
        busy = {name for name in busy if is_running(out / RUNS / name)}
    return busy


def _units(out: Path, names: Sequence[str], command: Sequence[str], pack: bool) -> list[Unit]:
    """The units of planned runs. With `pack` those train together that can; what has failed runs alone, so that neither it nor
    the others fail again because of each other.
    """

    from sweeps.packing import group

    failed = {name for name in names if (out / FAILED / f"{name}.json").is_file()}
    together = [name for name in names if pack and name not in failed]
    groups = group({name: load_config(out / CONFIGS / f"{name}.yaml") for name in together})
    groups += [[name] for name in names if name not in together]
    return [unit(out, members, command) for members in groups]


def plan(grid: Path, out: Path, overrides: Sequence[str] = (), plugins: Sequence[Path] = ()) -> list[str]:
    """Write a grid's plan and configs under `out`; returns the names of its runs, each once. Loads each backbone once."""
    from harness.config.identity import Digests, run_name
    from harness.config.schema import Config
    from harness.data.info import DatasetInfo
    from harness.methods.registry import method_digest
    from harness.models.backbone import backbone_digest
    from harness.symptoms.sets import load_sets, sets_digest
    from sweeps.grid import read_grid

    configs = read_grid(
        grid, [*overrides, f"run.out={json.dumps(str(out / RUNS), ensure_ascii=False)}"], plugins
    )  # quoted: overrides are YAML
    datasets = {path: DatasetInfo.load(path).digest for path in {config.data.path for config in configs}}
    symptoms = {files: sets_digest(load_sets(files)) for files in {config.symptoms for config in configs}}
    backbones = {backbone: backbone_digest(backbone) for backbone in dict.fromkeys(c.backbone for c in configs)}
    runs: dict[str, Config] = {}
    for config in configs:
        files = datasets[config.data.path], backbones[config.backbone], symptoms[config.symptoms]
        digests = Digests(*files, method_digest(config.method.name))
        runs.setdefault(run_name(config, digests), config)
    for name, config in runs.items():
        write_text(out / CONFIGS / f"{name}.yaml", config.to_yaml())
    log.info("%d combinations are %d different runs", len(configs), len(runs))
    _add_plan(out, Plan(grid=str(grid), runs=tuple(runs)))
    return list(runs)


def _add_plan(out: Path, new: Plan) -> None:
    """Put a plan beside those that the sweep has; one whose runs are all in the new one is replaced."""
    others = [plan for plan in plans(out) if not set(plan.runs) <= set(new.runs)]
    for other in others:
        log.warning(
            "%s: planned here before, from %s: %d runs, which stay; status and table show both, this command works on the new",
            out,
            other.grid,
            len(other.runs),
        )
    everything = dict.fromkeys(name for plan in (*others, new) for name in plan.runs)
    written = [plan.model_dump(mode="json") for plan in (*others, new)]
    write_json(out / PLAN, {"runs": list(everything), "plans": written})
