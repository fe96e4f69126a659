"""The demo verb: `vipbench demo --out demo_out` (`make demo` runs it)."""

import json
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
FIGURES: dict[str, list[str]] = {
    "few_shot": [],
    "attention": ["method=vip", "shots=16"],
    "card": ["method=vip", "shots=16"],
}


def demo(
    out: Annotated[Path, typer.Option(help="where data, run directories and table go")] = Path("demo_out"),
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run, such as data.shots=1")] = None,
) -> None:
    """Draw the embedded benchmark, run four methods on it with the small CLIP, print the table and write a page."""
    from vipbench.harness.data.info import INFO
    from vipbench.harness.demo.benchmark import make_dataset
    from vipbench.harness.report.page.build import Options, build_page
    from vipbench.harness.report.tables import load_runs, make_table, to_markdown
    from vipbench.harness.system.files import disk_errors, write_text
    from vipbench.sweeps.executors.local import LocalExecutor
    from vipbench.sweeps.runner import run_sweep

    data, sweep, file, page = out / "data", out / "sweep", out / "table.md", out / "report.html"
    if not (data / INFO).is_file():
        with disk_errors(out):
            make_dataset(data)
    places = {
        "data.path": data,
        "backbone.name": ROOT / "harness" / "demo" / "model",
        "symptoms": ROOT / "symptoms_cache" / "demo" / "lesions.json",
    }
    given = [
        f"{key}={json.dumps(str(place), ensure_ascii=False)}" for key, place in places.items()
    ]  # overrides are YAML
    states = run_sweep(ROOT / "sweeps" / "demo.yaml", sweep, LocalExecutor(jobs=jobs), [*given, *(overrides or [])])
    table = to_markdown(make_table(load_runs(sweep), ["method"], ["shots"], ["accuracy"]))
    write_text(file, table)
    write_text(page, build_page([sweep], Options(title="Drawn lesions, the embedded benchmark")))
    typer.echo(f"\nTest accuracy on drawn lesions, by shots per class (chance is 25.00):\n\n{table}")
    figures = _draw(sweep, out)
    typer.echo(f"table: {file}\npage: {page}\nfigures: {', '.join(map(str, figures))}")
    typer.echo(f"run directories: {sweep / 'runs'}\ndataset: {data}")
    failed = [state for state in states if state.state != "done"]
    for state in failed:
        typer.echo(f"{state.state}: {state.name}: {state.reason}", err=True)
    raise typer.Exit(1 if failed else 0)


def _draw(sweep: Path, out: Path) -> list[Path]:
    """Draw the figures that the runs allow, each named after its kind; returns their files."""
    from vipbench.harness.errors import UserError
    from vipbench.harness.report.figures.data import load
    from vipbench.harness.report.figures.registry import Query, render
    from vipbench.harness.system.files import write_bytes

    written = []
    for kind, filters in FIGURES.items():
        try:
            content = render(kind, Query(load(sweep, filters)))
        except UserError as error:  # of runs that failed, or that the overrides left out
            typer.echo(f"{kind} is not drawn: {error}", err=True)
            continue
        write_bytes(out / f"{kind}.svg", content)
        written.append(out / f"{kind}.svg")
    return written
