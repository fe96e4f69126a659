"""A table as one HTML file that needs nothing else; a cell opens to its runs and their values."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vipbench.harness.report.tables.cells import Key, Table
from vipbench.harness.report.tables.text import (
    SET_APART,
    Signs,
    cell_text,
    column_title,
    notes,
    reported_text,
    row_header,
    row_values,
    run_lines,
    sources,
)

SIGNS = Signs(best="{}")
TEMPLATE = "table.html.jinja2"


def to_html(table: Table, show_runs: bool = False) -> str:
    """A document with the table. The lines of a cell name run directories, with `show_runs` their paths."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    letters = sources(table)
    return environment.get_template(TEMPLATE).render(
        caption=table.layout.caption,
        label=table.layout.label,
        row_header=row_header(table),
        columns=[column_title(table, column) for column in table.columns],
        rows=[
            (row_values(table, row), [_cell(table, row, column, show_runs) for column in table.columns])
            for row in table.rows
        ],
        reported=[
            (
                row_values(table, reported.key),
                letters[reported.source],
                [reported_text(reported, column, SIGNS) for column in table.columns],
            )
            for reported in table.reported
        ],
        set_apart=SET_APART,
        notes=notes(table, underlined=True),
    )


def _cell(table: Table, row: Key, column: Key, show_runs: bool) -> tuple[str, str, list[str]]:
    """A cell's class ("best", "second" or ""), its text, and a line per run."""
    cell = table.cells.get((row, column))
    kind = ""
    if cell is not None:
        kind = "best" if table.is_best(row, column) else "second" if table.is_second(row, column) else ""
    return kind, cell_text(table, row, column, SIGNS), run_lines(table, row, column, path=show_runs)
