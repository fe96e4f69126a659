"""Reported rows: published figures beside those of runs, from a YAML file, set apart and never marked as the best.

- row: {method: ViP}                  # by the names of the table's rows
  source: "arXiv 2409.00341, table 1"
  cells:
    - {metric: accuracy, at: {shots: 16}, mean: 83.5, deviation: 0.4, runs: 3}   # fractions in per cent, as in the table
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, did_you_mean, shortened
from vipbench.harness.report.tables.cells import Cell, Key, ReportedRow, Table
from vipbench.harness.report.tables.layout import Words
from vipbench.harness.report.tables.values import NO_VALUE, PLAIN, show
from vipbench.harness.system.files import read_any_yaml

MOST_BYTES = 1 << 20
Scalar = str | int | float


class ReportedCell(Section):
    """A published figure, by metric and values of the columns' settings; fractions are in per cent."""

    metric: str
    at: Mapping[str, Scalar] = {}
    mean: float
    deviation: float | None = Field(None, ge=0)
    runs: PositiveInt | None = None


class Reported(Section):
    """A published row and its source."""

    row: Mapping[str, Scalar]
    source: Words
    cells: Annotated[tuple[ReportedCell, ...], Field(min_length=1)]


def read_reported(path: Path) -> list[Reported]:
    """Read a file of reported rows. Raises UserError where it is none."""
    content = read_any_yaml(path, MOST_BYTES)
    if not isinstance(content, list):
        raise UserError(f"{path}: should be a list of rows with row, source and cells; found {shortened(content)}")
    return [validate(Reported, row, where=f"{path}: row {number}") for number, row in enumerate(content, start=1)]


def add_reported(table: Table, rows: Sequence[Reported], where: str = "--reported") -> Table:
    """Add reported rows below those of runs. Columns of the table that a row does not name have no figure.

    Raises:
        UserError: a setting or a column that the table does not have.
    """
    return replace(table, reported=[*table.reported, *(_row(table, row, where) for row in rows)])


def _row(table: Table, row: Reported, where: str) -> ReportedRow:
    for name in row.row:
        if name not in table.row_names:
            raise UserError(f"{where}: the table's rows have no {name!r}; {did_you_mean(name, table.row_names)}")
    key = tuple(row.row.get(name, NO_VALUE) for name in table.row_names)
    return ReportedRow(key, dict(_cell(table, cell, where) for cell in row.cells), row.source)


def _cell(table: Table, cell: ReportedCell, where: str) -> tuple[Key, Cell]:
    at = {name: show(value) for name, value in cell.at.items()}
    needed = _ambiguous(table, cell.metric)
    found = [
        column
        for column in table.columns
        if column[0] == cell.metric
        and at.items() <= dict(zip(table.column_names, map(show, column[1:]), strict=True)).items()
    ]
    if not found or not set(needed) <= set(at):
        shown = ", ".join([cell.metric, *(f"{name}={value}" for name, value in at.items())])
        named = f"a metric and {', '.join(needed)}" if needed else "a metric"
        raise UserError(f"{where}: the table has no column {shown!r}; a column is {named}")
    if cell.metric not in PLAIN and not 0 <= cell.mean <= 100:
        raise UserError(f"{where}: {cell.metric} {cell.mean} is no percentage")
    scale = 1 if cell.metric in PLAIN else 100
    deviation = None if cell.deviation is None else cell.deviation / scale
    return found[0], Cell(cell.mean / scale, deviation, cell.runs or 0)


def _ambiguous(table: Table, metric: str) -> list[str]:
    """The settings in which the columns of a metric differ, which a figure has to name."""
    columns = [column[1:] for column in table.columns if column[0] == metric]
    return [name for place, name in enumerate(table.column_names) if len({column[place] for column in columns}) > 1]
