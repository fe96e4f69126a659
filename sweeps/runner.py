"""Plan a grid and have what is missing of it run: here, over an allocation, or as jobs of a cluster.

    vipbench sweep run sweeps/few_shot.yaml --out DIR --jobs 2
    vipbench sweep status DIR

All state is files under DIR: sweep.json (the plan), configs/, runs/ (the run directories), logs/, failed/ (why a run failed),
how.json (which executor, for `retry`) and jobs/ (what was submitted to Slurm).
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field

from harness.config import Section
from harness.errors import UserError
from harness.files import read_json, write_json, write_text
from harness.results import is_finished
from sweeps.jobs import JOBS, entries
from sweeps.local import LocalExecutor
from sweeps.ranks import TorchrunExecutor
from sweeps.slurm import SlurmExecutor
from sweeps.status import RunState, planned, sweep_status
from sweeps.units import CONFIGS, FAILED, LOGS, PLAN, RUNS, Executor, Unit

log = logging.getLogger(__name__)

HOW = "how.json"
HARNESS = Path(__file__).parents[1] / "harness"
RUN_COMMAND = (sys.executable, str(HARNESS / "run.py"))
PACK_COMMAND = (sys.executable, str(HARNESS / "pack.py"))
SECONDS_TO_PLAN = 1800.0  # that the other nodes of an allocation wait for one that plans


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
) -> list[RunState]:
    """Run what a grid plans and is neither finished nor a cluster's job yet; returns where every planned run stands.

    Args:
        executor: what runs it; None: this machine, one run at a time.
        pack: train runs together that differ only in seed, shots or learning rate.
        command: starts one run when a config file is added to it.

    Raises:
        UserError: the grid or what it names is wrong, or another process works on this sweep. A run that fails is
            recorded, and the rest go on.
    """
    executor = executor or LocalExecutor()
    out.mkdir(parents=True, exist_ok=True)

    def missing() -> list[Unit]:
        names = plan(grid, out, overrides)
        write_json(out / HOW, {"executor": executor.model_dump(mode="json"), "pack": pack})
        return _units(out, _missing(out, names), command, pack)

    return _work(out, executor, missing)


def retry(out: Path, only_failed: bool, command: Sequence[str] = RUN_COMMAND) -> list[RunState]:
    """Run what is missing of a sweep, or what failed of it, in the way it was run last; returns where every planned run stands.

    Raises:
        UserError: there is no sweep at `out`, or another process works on it.
    """
    names = planned(out)
    how = How(**read_json(out / HOW))

    def missing() -> list[Unit]:
        failed = {state.name for state in sweep_status(out) if state.state == "failed"}
        wanted = [name for name in _missing(out, names) if name in failed or not only_failed]
        return _units(out, wanted, command, how.pack)

    return _work(out, how.executor, missing)


def _work(out: Path, executor: Executor, find: Callable[[], list[Unit]]) -> list[RunState]:
    """Find what there is to do on a sweep and do it, together with other commands only where the executor is made for that."""
    with _locked(out, executor):
        units = find()
        if executor.alone:
            executor.run(out, units)
    if not executor.alone:
        executor.run(out, units)
    return sweep_status(out)


@contextmanager
def _locked(out: Path, executor: Executor) -> Iterator[None]:
    """Keep other processes off a sweep. Raises UserError when one is at work that this executor cannot share it with."""
    try:
        lock = FileLock(out / ".lock").acquire(timeout=0 if executor.alone else SECONDS_TO_PLAN)
    except Timeout as error:
        raise UserError(
            f"{out}: another process is working on this sweep; see `vipbench sweep status {out}`"
        ) from error
    with lock:
        for folder in (LOGS, FAILED, JOBS):
            (out / folder).mkdir(exist_ok=True)
        yield


def _missing(out: Path, names: Sequence[str]) -> list[str]:
    """Planned runs that are neither finished nor waiting or running as a cluster's job."""
    left = [name for name in names if not is_finished(out / RUNS / name)]
    submitted = {name for name, entry in entries(out / JOBS).items() if entry.active}
    missing = [name for name in left if name not in submitted]
    log.info("%d of them are finished already", len(names) - len(left))
    if len(missing) < len(left):
        log.info("%d of them are jobs already, waiting or running", len(left) - len(missing))
    return missing


def _units(out: Path, names: Sequence[str], command: Sequence[str], pack: bool) -> list[Unit]:
    from harness.config import Config
    from sweeps.packing import group

    files = {name: out / CONFIGS / f"{name}.yaml" for name in names}
    groups = group({name: Config.load(file) for name, file in files.items()}) if pack else [[name] for name in names]
    units = []
    for members in groups:
        start = command if len(members) == 1 else PACK_COMMAND
        log_file = out / LOGS / f"{members[0]}.log"
        units.append(Unit(tuple(members), (*start, *(str(files[name]) for name in members)), log_file))
    return units


def plan(grid: Path, out: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write a grid's plan and configs under `out`; returns the names of its runs, each once. Loads each backbone once."""
    from harness.backbone import backbone_digest
    from harness.config import Config, Digests, run_name
    from harness.data.info import DatasetInfo
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
