"""Derive one table from another: references in every column, averages over a setting, harmonic means."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, harmonic_mean

from vipbench.harness.errors import UserError
from vipbench.harness.report.tables.cells import Cell, Key, Table
from vipbench.harness.report.tables.values import AVERAGE, NO_VALUE

SHOTS = "shots"
REFERENCES = "Runs without training images or without a column's setting, such as zero-shot, stand in every column."


def spread_references(table: Table) -> Table:
    """Put runs that have no value of a column's setting, or 0 shots, into every column that has one, instead of their own."""

    def open_places(column: Key) -> set[int]:
        """The places of a column's values that do not bind the runs in it."""
        values = zip(["", *table.column_names], column, strict=True)
        return {place for place, (name, value) in enumerate(values) if value == NO_VALUE or (name, value) == (SHOTS, 0)}

    def targets(column: Key) -> list[Key]:
        places = open_places(column)
        return [
            other
            for other in table.columns
            if len(open_places(other)) < len(places)
            and all(place in places or value == column[place] for place, value in enumerate(other))
        ]

    cells, missing = dict(table.cells), dict(table.missing)
    spread = {column: targets(column) for column in table.columns if open_places(column)}
    spread = {column: found for column, found in spread.items() if found}
    for (row, column), cell in table.cells.items():
        if column in spread:
            del cells[row, column]
            for target in spread[column]:
                cells.setdefault((row, target), cell)
    by_key = {column[1:]: [target[1:] for target in found] for column, found in spread.items()}
    for (row, key), runs in table.missing.items():
        if key in by_key:
            del missing[row, key]
            missing |= {(row, target): runs for target in by_key[key]}
    if not spread:
        return table
    columns = [column for column in table.columns if column not in spread]
    return replace(table, columns=columns, cells=cells, missing=missing, remarks=[*table.remarks, REFERENCES])


def add_average(table: Table, name: str) -> Table:
    """Add columns with the mean over a setting of the columns, such as the dataset: each of its values counts the same.

    A row that has no value for one of them has no average.

    Raises:
        UserError: no setting of the columns is called that.
    """
    if name not in table.column_names:
        raise UserError(f"--average: {name!r} is not among the columns: {', '.join(table.column_names) or 'none'}")
    place = 1 + table.column_names.index(name)
    parts: dict[Key, list[Key]] = {}
    for column in table.columns:
        parts.setdefault((*column[:place], AVERAGE, *column[place + 1 :]), []).append(column)
    values = {column[place] for column in table.columns}
    parts = {key: found for key, found in parts.items() if len(found) == len(values) > 1}
    added = {
        (row, key): cell
        for row in table.rows
        for key, found in parts.items()
        if (cell := _combined(table, row, found, fmean)) is not None
    }
    columns = [*table.columns, *parts]
    metrics = list(dict.fromkeys(column[0] for column in columns))
    columns.sort(key=lambda column: metrics.index(column[0]))
    note = f"{AVERAGE}: the mean over {len(values)} values of {name}, none where one of them is missing."
    return replace(table, columns=columns, cells=table.cells | added, remarks=[*table.remarks, note])


def add_harmonic_mean(table: Table, name: str, first: str, second: str) -> Table:
    """Add a metric, the harmonic mean of the means of two others; none where they are not of the same number of runs."""
    keys = [column[1:] for column in table.columns if column[0] == first]
    added = {
        (row, (name, *key)): cell
        for row in table.rows
        for key in keys
        if (cell := _combined(table, row, [(first, *key), (second, *key)], harmonic_mean, equal=True)) is not None
    }
    place = 1 + max(place for place, column in enumerate(table.columns) if column[0] == second)
    columns = [*table.columns[:place], *((name, *key) for key in keys), *table.columns[place:]]
    return replace(table, columns=columns, cells=table.cells | added)


def _combined(
    table: Table, row: Key, columns: Sequence[Key], combine: Callable[[Sequence[float]], float], equal: bool = False
) -> Cell | None:
    """A cell from the means of a row's cells; None where one is missing or undefined, or lacks runs."""
    cells: Mapping[Key, Cell | None] = {column: table.cells.get((row, column)) for column in columns}
    found = [cell for cell in cells.values() if cell is not None and not math.isnan(cell.mean)]
    if len(found) < len(columns) or (equal and len({cell.count for cell in found}) > 1):
        return None
    values = tuple({(value.run, value.value): value for cell in found for value in cell.values}.values())
    count = found[0].count if equal else sum(cell.count for cell in found)
    doubtful = max(cell.doubtful for cell in found) if equal else sum(cell.doubtful for cell in found)
    return Cell(combine([cell.mean for cell in found]), None, count, doubtful, values=values, derived=True)
