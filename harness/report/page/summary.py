"""Tables of a page: one per dataset, whose cells name the runs that they are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.statistics.intervals import Interval, from_json
from vipbench.harness.report.groupings import SYMPTOM_SET, with_groupings
from vipbench.harness.report.page.charts import Chart, chart_of
from vipbench.harness.report.sources import GROUP
from vipbench.harness.report.tables.cells import Key, Table
from vipbench.harness.report.tables.derive import spread_references
from vipbench.harness.report.tables.make import METHOD, NOT_RESULTS, SEEDS, make_table
from vipbench.harness.report.tables.text import Signs, cell_text, column_title, notes, row_header, row_values
from vipbench.harness.report.tables.values import show
from vipbench.harness.runs.directory import INTERVALS

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
CHARTED = ("accuracy", "macro_f1")
SIGNS = Signs(best="{}")
DATASET, SHOTS, BACKBONE = "dataset", "data.shots", "backbone.name"


@dataclass(frozen=True)
class CellView:
    """A cell: its text, the numbers of its runs, and "best", "second" or ""."""

    text: str
    runs: Sequence[int]
    kind: str


@dataclass(frozen=True)
class TableView:
    """A table: rows of names, with the numbers of all runs of the row, and cells; and a chart of its first metric."""

    title: str
    names: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[int], Sequence[CellView]]]
    notes: Sequence[str]
    charts: Sequence[Chart]


def summary_tables(
    runs: pd.DataFrame, numbers: Mapping[str, int], recorded: Mapping[str, Any] | None
) -> tuple[list[TableView], list[str]]:
    """Tables of runs, one per dataset, and sentences on what could not be shown.

    Args:
        numbers: of the runs on the page, by their directories.
        recorded: contents of intervals.json by run, for the cells of one run; None: predictions are read, which gives the cells
            of several runs an interval too, and the table its remarks on thin evidence.
    """
    if runs.empty:
        return [], ["No run is finished, so that there is no table."]
    metrics = [name for name in METRICS if f"metrics.{name}" in runs]
    try:
        table = _table(runs, metrics)
        if recorded is None:
            from vipbench.harness.report.tables.evidence import (
                add_evidence,  # needs PyTorch, which takes seconds to import
            )

            table = add_evidence(table)
        else:
            table = _add_recorded(table, recorded)
    except UserError as error:
        return [], [f"No table: {error}"]
    place = 1 + table.column_names.index(DATASET)
    views = []
    for dataset in dict.fromkeys(column[place] for column in table.columns):
        part = _of_dataset(table, place, dataset)
        columns = {
            name: [column for column in part.columns if column[0] == name] for name in CHARTED if name in metrics
        }
        samples = runs.loc[runs[DATASET] == dataset, "metrics.samples"].unique().tolist()
        charts = [
            chart_of(part, own, f"{name} on {show(dataset)}".replace("_", " "), samples)
            for name, own in columns.items()
        ]
        views.append(_view(part, str(show(dataset)), numbers, [chart for chart in charts if chart]))
    return views, []


def _table(runs: pd.DataFrame, metrics: Sequence[str]) -> Table:
    """The table of all runs; where cells would mix settings, these become rows.

    Raises:
        UserError: runs differ in something that is no setting, as in the content of a dataset.
    """
    rows = [name for name in (GROUP, BACKBONE) if name in runs and runs[name].nunique() > 1]
    rows, columns = [*rows, METHOD], [DATASET, *([SHOTS] if SHOTS in runs else [])]
    try:
        return spread_references(make_table(runs, rows, columns, metrics))
    except UserError:
        runs = with_groupings(runs, [SYMPTOM_SET])
        others = [name for name in _differing(runs) if name not in (*rows, *columns)]
        if not others:
            raise
        return spread_references(make_table(runs, [*rows, *others], columns, metrics))


def _add_recorded(table: Table, recorded: Mapping[str, Any]) -> Table:
    """Give the cells of one run the interval that the run recorded.

    Raises:
        UserError: the contents of a run's intervals.json are no intervals.
    """
    cells = dict(table.cells)
    for (row, column), cell in table.cells.items():
        if len(cell.values) == 1 and not cell.derived:
            run, metric = cell.values[0].run, column[0]
            if found := recorded.get(run, {}).get(metric):
                try:
                    own = from_json({metric: found})[metric]
                except (TypeError, AttributeError) as error:
                    raise UserError(f"{run}/{INTERVALS}: damaged: it holds no intervals") from error
                cells[row, column] = replace(cell, interval=own if isinstance(own, Interval) else None)
    return replace(table, cells=cells)


def _differing(runs: pd.DataFrame) -> list[str]:
    """Settings, no options of methods, in which runs of one method differ."""
    ignored = (*NOT_RESULTS, *SEEDS, METHOD, DATASET)
    settings = [
        name
        for name in map(str, runs.columns)
        if name not in ignored and not name.startswith(("metrics.", "run.", "digests.", "method."))
    ]
    groups = [group for _, group in runs.groupby("method.name", sort=False)]
    return [name for name in settings if any(group[name].map(show).nunique() > 1 for group in groups)]


def _of_dataset(table: Table, place: int, dataset: object) -> Table:
    """The part of a table that is of one dataset, without the rows that have nothing there."""

    def without(column: Key) -> Key:
        return (*column[:place], *column[place + 1 :])

    columns = {column: without(column) for column in table.columns if column[place] == dataset}
    cells = {(row, columns[column]): cell for (row, column), cell in table.cells.items() if column in columns}
    missing = {
        (row, (*key[: place - 1], *key[place:])): runs
        for (row, key), runs in table.missing.items()
        if key[place - 1] == dataset
    }
    filled = {row for row, _ in [*cells, *missing]}
    return replace(
        table,
        rows=[row for row in table.rows if row in filled],
        columns=list(columns.values()),
        column_names=[name for name in table.column_names if name != DATASET],
        cells=cells,
        missing=missing,
    )


def _view(table: Table, title: str, numbers: Mapping[str, int], charts: Sequence[Chart]) -> TableView:
    rows = []
    for row in table.rows:
        cells = [_cell(table, row, column, numbers) for column in table.columns]
        runs = list(dict.fromkeys(number for cell in cells for number in cell.runs))
        rows.append((row_values(table, row), runs, cells))
    columns = [column_title(table, column) for column in table.columns]
    return TableView(title, row_header(table), columns, rows, notes(table, underlined=True), charts)


def _cell(table: Table, row: Key, column: Key, numbers: Mapping[str, int]) -> CellView:
    cell = table.cells.get((row, column))
    text = cell_text(table, row, column, SIGNS)
    if cell is None:
        return CellView(text, (), "")
    kind = "best" if table.is_best(row, column) else "second" if table.is_second(row, column) else ""
    runs = [numbers[value.run] for value in cell.values]
    return CellView(text, runs, kind)
