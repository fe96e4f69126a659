"""The sweep verbs: `vipbench sweep run GRID --out DIR`, and `status`, `cancel` and `retry` of that DIR."""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.options import Plugins
from vipbench.harness.errors import UserError

if TYPE_CHECKING:
    from vipbench.sweeps.executors.base import Executor
    from vipbench.sweeps.status import RunState

app = typer.Typer(no_args_is_help=True, help="Work through a grid of runs.")

LOCAL, TORCHRUN, SLURM = "--executor local", "--executor torchrun", "--executor slurm"
SECONDS_BETWEEN_LOOKS = 10.0
Sweep = Annotated[Path, typer.Argument(metavar="DIR", help="a sweep's --out")]


class Kind(StrEnum):
    """Names of executors."""

    local = "local"
    in_process = "in_process"
    torchrun = "torchrun"
    slurm = "slurm"


@app.command()
def run(
    grid: Annotated[Path, typer.Argument(help="a grid in YAML, see sweeps/")],
    out: Annotated[Path, typer.Option(help="where plan, logs and run directories go")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value or @FILE.yaml, for every run")] = None,
    plugin: Plugins = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="train runs together that differ in seed, shots or rate")
    ] = False,
    executor: Annotated[
        Kind, typer.Option(help="this machine, this process, one allocation, or a cluster's queue")
    ] = Kind.local,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="processes at a time; default: one per GPU, or one", rich_help_panel=LOCAL)
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="0,1,...: each run gets one of them", rich_help_panel=LOCAL)] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT on the first node", rich_help_panel=TORCHRUN)
    ] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="nodes", rich_help_panel=TORCHRUN)] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="runs at a time", rich_help_panel=TORCHRUN)] = None,
    profile: Annotated[
        Path | None, typer.Option(help="settings in YAML, which the options below override", rich_help_panel=SLURM)
    ] = None,
    partition: Annotated[str | None, typer.Option(help="as of sbatch", rich_help_panel=SLURM)] = None,
    account: Annotated[str | None, typer.Option(help="as of sbatch", rich_help_panel=SLURM)] = None,
    qos: Annotated[str | None, typer.Option(help="as of sbatch", rich_help_panel=SLURM)] = None,
    constraint: Annotated[str | None, typer.Option(help="as of sbatch", rich_help_panel=SLURM)] = None,
    time: Annotated[
        str | None, typer.Option(help="before a job is requeued, as of sbatch", rich_help_panel=SLURM)
    ] = None,
    mem: Annotated[str | None, typer.Option(help="of each node, as of sbatch", rich_help_panel=SLURM)] = None,
    gpus_per_run: Annotated[int | None, typer.Option(min=0, help="on all its nodes", rich_help_panel=SLURM)] = None,
    nodes_per_run: Annotated[int | None, typer.Option(min=1, help="default: 1", rich_help_panel=SLURM)] = None,
    processes_per_run: Annotated[
        int | None, typer.Option(min=1, help="default: one per GPU, or one per node", rich_help_panel=SLURM)
    ] = None,
    cpus_per_run: Annotated[int | None, typer.Option(min=1, help="on all its nodes", rich_help_panel=SLURM)] = None,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="jobs at a time", rich_help_panel=SLURM)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="stay until all jobs have ended", rich_help_panel=SLURM)] = False,
) -> None:
    """Run the missing runs of a grid, or submit them. Exits with 1 when a run failed, 130 when interrupted."""
    given: dict[Kind, dict[str, Any]] = {
        Kind.local: {"jobs": jobs, "gpus": gpus.split(",") if gpus else None},
        Kind.torchrun: {"rdzv_endpoint": rdzv_endpoint, "nnodes": nnodes, "nproc_per_node": nproc_per_node},
        Kind.slurm: {
            "profile": profile,
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "time": time,
            "mem": mem,
            "gpus_per_run": gpus_per_run,
            "nodes_per_run": nodes_per_run,
            "processes_per_run": processes_per_run,
            "cpus_per_run": cpus_per_run,
            "max_parallel": max_parallel,
            "wait": wait or None,
        },
    }
    try:
        from vipbench.sweeps.runner import run_sweep

        chosen = _executor(executor, given)
        states = run_sweep(grid, out, chosen, overrides or [], pack=pack, plugins=plugin or [])
        if wait:
            states = _watch(out, [state.name for state in states])
    except KeyboardInterrupt:
        what = "what was submitted goes on" if executor is Kind.slurm else "what was running has been stopped"
        typer.echo(f"interrupted: {what}; the same command runs what is missing", err=True)
        raise typer.Exit(130) from None
    _end(states)


@app.command()
def status(out: Sweep) -> None:
    """Show the state of each run of a sweep."""
    from vipbench.sweeps.status import sweep_status

    states = sweep_status(out)
    if not states:
        typer.echo("nothing was planned here yet; the same `vipbench sweep run` goes on")
    _show(states)


@app.command()
def cancel(out: Sweep) -> None:
    """Take a sweep's jobs out of Slurm's queue; those that run stop at a checkpoint."""
    from vipbench.sweeps.executors.submissions import cancel
    from vipbench.sweeps.plan import planned
    from vipbench.sweeps.units import JOBS

    planned(out)
    count = cancel(out / JOBS)
    typer.echo(
        f"{count} jobs cancelled" if count else "none of its runs is in Slurm's queue; other executors end with Ctrl-C"
    )


@app.command()
def retry(
    out: Sweep,
    failed: Annotated[bool, typer.Option("--failed", help="only what failed, not all that is missing")] = False,
) -> None:
    """Run the missing runs of a sweep, in the way it was run last."""
    try:
        from vipbench.sweeps.runner import retry as again

        states = again(out, failed)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command runs what is missing", err=True)
        raise typer.Exit(130) from None
    _end(states)


def _executor(kind: Kind, given: Mapping[Kind, Mapping[str, Any]]) -> "Executor":
    """The executor that options describe. Raises UserError for an option of another one."""
    from pydantic import TypeAdapter

    from vipbench.sweeps.executors.profile import Profile
    from vipbench.sweeps.runner import AnyExecutor

    options = {of: {name: value for name, value in those.items() if value is not None} for of, those in given.items()}
    for of, those in options.items():
        if of is not kind and those:
            raise UserError(f"--{next(iter(those)).replace('_', '-')} is for --executor {of}, not {kind}")
    own = options.get(kind, {})
    if kind is Kind.slurm:
        own.pop("wait", None)
        own = {"profile": Profile.load(own.pop("profile", None), own)}
    union: TypeAdapter[Executor] = TypeAdapter(AnyExecutor)
    return union.validate_python({"kind": str(kind), **own})


def _watch(out: Path, names: Sequence[str]) -> "list[RunState]":
    """Wait until the jobs of runs have ended; an interruption does not touch them."""
    from time import sleep

    from vipbench.harness.system.progress import Progress
    from vipbench.sweeps.status import sweep_status

    states, ended = sweep_status(out, names), 0
    with Progress("sweep", len(states), "runs") as progress:
        while True:
            now = sum(not state.queued for state in states)
            failures = sum(state.state == "failed" for state in states)
            progress.advance(now - ended, note=f"{failures} failed" if failures else None)
            ended = now
            if ended == len(states):
                return states
            sleep(SECONDS_BETWEEN_LOOKS)
            states = sweep_status(out, names)


def _end(states: "list[RunState]") -> None:
    """Show the states of runs; exit with 0 when all are done or on their way as jobs, else with 1."""
    _show(states)
    raise typer.Exit(0 if all(state.state == "done" or state.queued for state in states) else 1)


def _show(states: "list[RunState]") -> None:
    for state in states:
        if state.state != "done":
            typer.echo(f"{state.state:8} {state.name}" + (f"  {state.reason}" if state.reason else ""))
    counts = Counter[str](state.state for state in states)
    kinds = ["done", "running", "pending", "failed"] + ["damaged"] * bool(counts["damaged"])
    typer.echo(", ".join(f"{counts[kind]} {kind}" for kind in kinds))
