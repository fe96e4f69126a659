"""A table as Markdown."""

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
        [*map(_escape, row_header(table)), *(_escape(column_title(table, column)) for column in table.columns)],
        ["---"] * len(table.row_names) + ["---:"] * len(table.columns),
    ]
    for row in table.rows:
        cells = [cell_text(table, row, column, SIGNS) for column in table.columns]
        lines.append([*map(_escape, row_values(table, row)), *cells])
    if table.reported:
        empty = [""] * (len(table.row_names) + len(table.columns) - 1)
        lines.append([f"*{SET_APART}*", *empty])
    letters = sources(table)
    for reported in table.reported:
        first, *others = map(_escape, row_values(table, reported.key))
        cells = [reported_text(reported, column, SIGNS) for column in table.columns]
        lines.append([f"{first} [{letters[reported.source]}]", *others, *cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{' '.join(notes(table))}\n"
    if table.layout.caption:
        text = f"{table.layout.caption}\n\n{text}"
    for place, runs in opened(table) if show_runs else []:
        text += f"\n{place}\n" + "".join(f"- {line}\n" for line in runs)
    return text


def _escape(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", r"\|")
