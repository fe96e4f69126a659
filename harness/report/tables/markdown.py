"""A table as Markdown."""

from collections.abc import Sequence

from vipbench.harness.report.tables.cells import Table
from vipbench.harness.report.tables.text import (
    SET_APART,
    Signs,
    cell_text,
    column_title,
    notes,
    opened,
    reported_text,
    row_header,
    row_values,
    sources,
)

SIGNS = Signs(best="**{}**")


def to_markdown(table: Table, show_runs: bool = False) -> str:
    """A Markdown table with a note on how to read it, and below it the runs of each cell."""
    lines = [
        [*map(escape, row_header(table)), *(escape(column_title(table, column)) for column in table.columns)],
        ["---"] * len(table.row_names) + ["---:"] * len(table.columns),
    ]
    for row in table.rows:
        cells = [cell_text(table, row, column, SIGNS) for column in table.columns]
        lines.append([*map(escape, row_values(table, row)), *cells])
    if table.reported:
        empty = [""] * (len(table.row_names) + len(table.columns) - 1)
        lines.append([f"*{SET_APART}*", *empty])
    letters = sources(table)
    for reported in table.reported:
        first, *others = map(escape, row_values(table, reported.key))
        cells = [reported_text(reported, column, SIGNS) for column in table.columns]
        lines.append([f"{first} [{letters[reported.source]}]", *others, *cells])
    text = f"{written_rows(lines)}\n\n{' '.join(notes(table))}\n"
    if table.layout.caption:
        text = f"{table.layout.caption}\n\n{text}"
    for place, runs in opened(table) if show_runs else []:
        text += f"\n{place}\n" + "".join(f"- {line}\n" for line in runs)
    return text


def written_rows(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells, the second of them the rule below the header, as lines of a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def escape(text: str) -> str:
    """Write a text so that a cell can hold it: on one line, without a bare |."""
    return " ".join(text.splitlines()).replace("|", r"\|")
