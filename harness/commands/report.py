"""The report verb: `vipbench table DIR`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """Formats of a table."""

    md = "md"
    csv = "csv"
    latex = "latex"


def table(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a sweep's --out, or a directory of run directories")
    ],
    rows: Annotated[str, typer.Option(help="config values that name a row: A,B")] = "method",
    columns: Annotated[str, typer.Option(help="config values that name a column: A,B")] = "shots",
    metric: Annotated[str, typer.Option(help="metrics: A,B")] = "accuracy",
    format: Annotated[Format, typer.Option(help="how to write it")] = Format.md,
    out: Annotated[Path | None, typer.Option(help="a file to write; default: print it")] = None,
) -> None:
    """Compare runs: mean ± sample standard deviation over seeds, best of each column marked."""
    from vipbench.harness.report.tables import FORMATS, load_runs, make_table
    from vipbench.harness.system.files import disk_errors, write_text

    with disk_errors(directory):
        made = make_table(load_runs(directory), _names(rows), _names(columns), _names(metric))
    text = FORMATS[format.value](made)
    if out:
        with disk_errors(out):
            write_text(out, text)
    else:
        typer.echo(text, nl=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
