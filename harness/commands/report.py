"""The report verbs: `vipbench table DIR`, `vipbench compare A B` and `vipbench runs DIR`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vipbench.harness.commands.options import listed_names
from vipbench.harness.errors import UserError


class Format(StrEnum):
    """Formats of a table."""

    md = "md"
    csv = "csv"
    latex = "latex"
    parquet = "parquet"
    html = "html"


class Preset(StrEnum):
    """Names of presets."""

    main = "main"
    ablation = "ablation"
    few_shot = "few_shot"
    base_to_new = "base_to_new"
    cost = "cost"
    zoo = "zoo"


def table(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="sweeps' --out, directories of run directories, or bundles (.zip)"),
    ],
    preset: Annotated[
        Preset | None, typer.Option(help="a table as papers have it; the options below change it")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="config values that name a row: A,B; default: method", show_default=False)
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="config values that name a column: A,B; default: shots", show_default=False)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="metrics: A,B, or of a class: sensitivity.NAME; default: accuracy")
    ] = None,
    references: Annotated[
        bool | None,
        typer.Option("--references/--no-references", help="zero-shot stands in every column, not in one of its own"),
    ] = None,
    average: Annotated[str | None, typer.Option(help="a setting of the columns to average over: dataset")] = None,
    evaluations: Annotated[
        bool | None, typer.Option("--evaluations/--no-evaluations", help="rows for `vipbench evaluate` too")
    ] = None,
    intervals: Annotated[
        bool | None,
        typer.Option("--intervals/--no-intervals", help="95% intervals, and remarks where evidence is thin"),
    ] = None,
    tests: Annotated[
        bool | None, typer.Option("--tests/--no-tests", help="paired tests against the best of each column, by Holm")
    ] = None,
    reported: Annotated[Path | None, typer.Option(help="published rows in YAML, with their source; set apart")] = None,
    layout: Annotated[Path | None, typer.Option(help="YAML: display names, order of rows, caption, label")] = None,
    caption: Annotated[str | None, typer.Option(help="of the table; before that of the layout")] = None,
    label: Annotated[str | None, typer.Option(help="of a LaTeX table; before that of the layout")] = None,
    show_runs: Annotated[bool, typer.Option("--show-runs", help="each cell's runs, with seed, value and path")] = False,
    format: Annotated[Format, typer.Option(help="how to write it")] = Format.md,
    out: Annotated[Path | None, typer.Option(help="a file to write; default: print it")] = None,
) -> None:
    """Compare runs: mean ± sample standard deviation over seeds, best of each column marked."""
    from dataclasses import replace

    from vipbench.harness.config.validation import validate
    from vipbench.harness.report.sources import GROUP, add_groups, open_sources, shown
    from vipbench.harness.report.tables import FORMATS, load_runs
    from vipbench.harness.report.tables.evidence import add_evidence
    from vipbench.harness.report.tables.layout import Layout, read_layout
    from vipbench.harness.report.tables.paired import add_tests
    from vipbench.harness.report.tables.presets import PRESETS, Query, query_table
    from vipbench.harness.report.tables.reported import add_reported, read_reported
    from vipbench.harness.report.tables.text import arranged
    from vipbench.harness.system.files import atomic_path, disk_errors

    if format is Format.parquet and out is None:
        raise UserError("--format parquet: give a file in --out")
    arrangement = (read_layout(layout) if layout else Layout()).model_dump()
    given = {"caption": caption, "label": label}
    arrangement |= {name: value for name, value in given.items() if value is not None}
    with open_sources(directories) as sources:
        with disk_errors(directories[0]):
            runs = add_groups(load_runs(*(source.folder for source in sources)), sources)
        query = PRESETS[preset.value](runs) if preset else Query()
        asked: dict[str, Any] = {
            "rows": listed_names(rows),
            "columns": listed_names(columns),
            "metrics": listed_names(metric),
        }
        asked |= {"references": references, "average": average, "evaluations": evaluations}
        asked |= {"intervals": intervals, "tests": tests}
        query = replace(query, **{name: value for name, value in asked.items() if value is not None})
        if GROUP in runs and GROUP not in (*query.rows, *query.columns):
            query = replace(query, rows=(GROUP, *query.rows))
        made = query_table(runs, query)
        made = arranged(replace(made, layout=validate(Layout, arrangement, where="--caption, --label")))
        if query.intervals:
            made = add_evidence(made)
        if query.tests:
            made = add_tests(made)
        if reported:
            made = add_reported(made, read_reported(reported), str(reported))
        content = FORMATS[format.value](made, show_runs)
        content = shown(sources, content) if isinstance(content, str) else content
    if out is None:
        typer.echo(content, nl=False)
        return
    with disk_errors(out), atomic_path(out) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="a run directory, or one of its evaluations")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another one")],
    most: Annotated[int, typer.Option(min=0, help="samples to list, of those on which they disagree")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, with all samples")] = False,
) -> None:
    """Compare two runs: differences in config, data and metrics, paired tests, samples on which they disagree."""
    from vipbench.harness.report.compare import compare_runs, to_json, to_lines

    compared = compare_runs(first, second)
    if as_json:
        typer.echo(json.dumps(to_json(compared), indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join(to_lines(compared, most)))


def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a sweep's --out, or a directory of run directories")
    ],
    filters: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE...", help="only runs of that setting: method=vip shots=16")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="metrics: A,B; default: accuracy,macro_f1", show_default=False)
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", help="print paths only, one per line")] = False,
) -> None:
    """List runs, finished or not: state, settings in which they differ, metrics, path."""
    from vipbench.harness.report.listing import list_runs, listing
    from vipbench.harness.report.rows import PLAN
    from vipbench.harness.system.files import disk_errors
    from vipbench.sweeps.status import sweep_status

    with disk_errors(directory):
        states = sweep_status(directory) if (directory / PLAN).is_file() else []
        found = list_runs(directory, filters or [], {state.name: (state.state, state.reason) for state in states})
    for line in found["run"] if paths else listing(found, listed_names(metric)):
        typer.echo(line)
