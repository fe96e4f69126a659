"""The words of a table in any format: header, cells, notes."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from vipbench.harness.report.tables.cells import OF_DATA, Cell, Key, ReportedRow, Table, Value
from vipbench.harness.report.tables.values import COEFFICIENTS, COSTS, LEVEL, figure, show

DAGGER, DOUBLE_DAGGER, ALIKE = "†", "‡", "≈"
DOUBTS = (
    f"{DAGGER}: some run kept an epoch of the warm-up, or its validation accuracy never rose above that of epoch 1."
)
SHARES = f"{DOUBLE_DAGGER}: some run trained together with others; seconds and memory are those of all of them."
COST_NOTE = (
    "Costs are no percentages: numbers that were trained or fitted, seconds of training, GiB of memory at the peak."
)
NOTE = "Mean ± sample standard deviation over seeds, in %; (n) runs; bold: best mean of a column; –: no run."
APART = "Rows of other data are marked apart."
UNDERLINED = "Underlined: second best mean of a column of at least three."
MISSING = "(n of m): runs that are planned and not finished are missing."
SET_APART = "Reported, not run here"
MOST_LISTED = 5  # unfinished runs in a note


@dataclass(frozen=True)
class Signs:
    """The signs of a format; `best` and `second` are templates of what they mark."""

    best: str
    second: str = "{}"
    no_run: str = "–"
    plus_minus: str = " ± "
    dagger: str = DAGGER
    double_dagger: str = DOUBLE_DAGGER
    alike: str = ALIKE


def arranged(table: Table) -> Table:
    """The rows in the order of the layout. Raises UserError where it names a row that is not there."""
    shown = {row: [show(value) for value in row] for row in table.rows}
    table.layout.check_order(list(shown.values()))
    return replace(table, rows=sorted(table.rows, key=lambda row: table.layout.place(shown[row])))


def row_header(table: Table) -> list[str]:
    """The names of the settings that name a row."""
    return [table.layout.name(name) for name in table.row_names]


def row_values(table: Table, key: Key) -> list[str]:
    """The values of a row's settings."""
    return [table.layout.name(show(value)) for value in key]


def column_title(table: Table, column: Key) -> str:
    """A column's metric and values: "accuracy, shots=16"; a display name may be given for "shots=16" as well."""
    names = table.layout.names
    pairs = zip(table.column_names, map(show, column[1:]), strict=True)
    named = [
        names.get(f"{name}={value}") or f"{names.get(name, name)}={names.get(value, value)}" for name, value in pairs
    ]
    return ", ".join([names.get(str(column[0]), str(column[0])), *named])


def cell_text(table: Table, row: Key, column: Key, signs: Signs) -> str:
    """Mean, deviation, interval and number of runs of a cell, with its marks."""
    cell, missing = table.cells.get((row, column)), len(table.missing_at(row, column))
    if cell is None:
        return f"{signs.no_run} (0 of {missing})" if missing else signs.no_run
    runs = f"({cell.count} of {cell.count + missing})" if missing else f"({cell.count})"
    if math.isnan(cell.mean):
        return f"undefined {runs}" if missing else "undefined"
    mark = "{}"
    if table.is_best(row, column):
        mark = signs.best
    elif table.is_second(row, column):
        mark = signs.second
    marks = (signs.dagger if cell.doubtful else "") + (signs.double_dagger if cell.shared else "")
    marks += signs.alike if cell.p is not None and cell.p >= LEVEL else ""
    return f"{mark.format(figure(column[0], cell.mean))}{_spread(cell, column, signs)} {runs}{marks}"


def reported_text(row: ReportedRow, column: Key, signs: Signs) -> str:
    """A published figure, with its deviation and number of runs where they are known."""
    cell = row.cells.get(column)
    if cell is None:
        return signs.no_run
    return f"{figure(column[0], cell.mean)}{_spread(cell, column, signs)}" + (f" ({cell.count})" if cell.count else "")


def _spread(cell: Cell, column: Key, signs: Signs) -> str:
    deviation = "" if cell.deviation is None else signs.plus_minus + figure(column[0], cell.deviation)
    if cell.interval is None:
        return deviation
    low, high = (figure(column[0], value) for value in (cell.interval.low, cell.interval.high))
    return f"{deviation} [{low}, {high}]"


def sources(table: Table) -> dict[str, str]:
    """A letter for each source of reported rows: a, b, ..."""
    named = dict.fromkeys(row.source for row in table.reported)
    return {source: chr(ord("a") + place % 26) * (1 + place // 26) for place, source in enumerate(named)}


def notes(table: Table, underlined: bool = False) -> list[str]:
    """Sentences on reading a table: its marks, the cells to doubt, what it leaves out, sources; `underlined`: with that sign."""
    sentences = [NOTE, UNDERLINED] if underlined else [NOTE]
    if set(table.row_names) & set(OF_DATA):
        sentences.append(APART)
    intervals = [cell.interval for cell in table.cells.values() if cell.interval]
    if intervals:
        methods = Counter(interval.method for interval in intervals)
        sentences.append(f"[low, high]: 95% interval ({'; '.join(methods)}).")
    if any(column[0] in COSTS for column in table.columns):
        sentences.append(COST_NOTE)
    if plain := [name for name in dict.fromkeys(column[0] for column in table.columns) if name in COEFFICIENTS]:
        sentences.append(f"No percentages: {', '.join(plain)}.")
    if any(cell.shared for cell in table.cells.values()):
        sentences.append(SHARES)
    if any(cell.doubtful for cell in table.cells.values()):
        sentences.append(DOUBTS)
    sentences += table.remarks
    if table.damaged:
        runs = "1 damaged run is" if table.damaged == 1 else f"{table.damaged} damaged runs are"
        sentences.append(f"{runs} left out.")
    if table.unfinished:
        count = len(table.unfinished)
        listed = "; ".join(table.unfinished[:MOST_LISTED]) + ("; ..." if count > MOST_LISTED else "")
        runs = "1 run is" if count == 1 else f"{count} runs are"
        sentences.append(f"{MISSING} {runs} not finished: {listed}.")
    sentences += [f"{letter}: reported in {source}." for source, letter in sources(table).items()]
    return sentences


def opened(table: Table) -> list[tuple[str, list[str]]]:
    """Each cell's place, and its `run_lines`."""
    return [
        (f"{' / '.join(row_values(table, row))}, {column_title(table, column)}", lines)
        for row in table.rows
        for column in table.columns
        if (lines := run_lines(table, row, column))
    ]


def run_lines(table: Table, row: Key, column: Key, path: bool = True) -> list[str]:
    """A line per run of a cell, finished or missing: "seed 1: 65.00  runs/coop_16shot_seed1_0123456789ab".

    Args:
        path: name the directory with its place, else by its last name.
    """
    cell = table.cells.get((row, column))
    named = [(f"{value.seed}: {_run_value(column, value)}", value.run) for value in (cell.values if cell else ())]
    named += table.missing_at(row, column)
    return [f"{words}  {run if path else Path(run).name}" for words, run in named]


def _run_value(column: Key, value: Value) -> str:
    return "undefined" if value.value is None else figure(column[0], value.value)
