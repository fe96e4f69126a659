"""The sweep verbs: `vipbench sweep run GRID --out DIR` and `vipbench sweep status DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sweeps.runner import RunState

app = typer.Typer(no_args_is_help=True, help="Work through a grid of runs.")


@app.command()
def run(
    grid: Annotated[Path, typer.Argument(help="a grid in YAML, see sweeps/")],
    out: Annotated[Path, typer.Option(help="where plan, logs and run directories go")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    pack: Annotated[
        bool, typer.Option("--pack", help="train runs together that differ in seed, shots or rate")
    ] = False,
) -> None:
    """Run what is missing of a grid. Exits with 1 when a run failed, 130 when interrupted."""
    from sweeps.runner import run_sweep

    try:
        states = run_sweep(grid, out, jobs, overrides or [], pack=pack)
    except KeyboardInterrupt:
        typer.echo("interrupted: what was running has been stopped; the same command runs what is missing", err=True)
        raise typer.Exit(130) from None
    _show(states)
    raise typer.Exit(0 if all(state.state == "done" for state in states) else 1)


@app.command()
def status(out: Annotated[Path, typer.Argument(metavar="DIR", help="a sweep's --out")]) -> None:
    """Say where each run of a sweep stands."""
    from sweeps.runner import sweep_status

    _show(sweep_status(out))


def _show(states: "list[RunState]") -> None:
    for state in states:
        if state.state != "done":
            typer.echo(f"{state.state:8} {state.name}" + (f"  {state.reason}" if state.reason else ""))
    counts = {kind: sum(state.state == kind for state in states) for kind in ("done", "running", "pending", "failed")}
    typer.echo(", ".join(f"{count} {kind}" for kind, count in counts.items()))
