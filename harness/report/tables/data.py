"""A table as data: CSV and Parquet, with raw numbers."""

import io
from typing import Any

import pandas as pd

from vipbench.harness.report.tables.cells import Cell, Key, Table
from vipbench.harness.report.tables.values import show
from vipbench.harness.runs.collect import DOUBTFUL

DONE = "done"


def to_frame(table: Table, show_runs: bool = False) -> pd.DataFrame:
    """One row per cell that has runs or lacks some: rows, columns, metric, mean, std, n, doubtful; further columns where needed.

    These are "missing" (runs), "low", "high" and "interval" (its method), "p_holm" (of the difference from the best of the
    column), and "source" of what is reported. With `show_runs` a row is a run: rows, columns, metric, seeds, value, run; and
    "state" where some run is not finished.
    """
    lines = []
    for row in table.rows:
        for column in table.columns:
            cell, missing = table.cells.get((row, column)), table.missing_at(row, column)
            place = _place(table, row, column)
            if show_runs:
                done = {"state": DONE} if table.missing else {}
                values = cell.values if cell else ()
                lines += [place | {**one.seeds, "value": one.value, "run": one.run} | done for one in values]
                lines += [place | {"value": None, "run": run, "state": state} for state, run in missing]
            elif cell or missing:
                lines.append(place | _figures(cell) | ({"missing": len(missing)} if table.missing else {}))
    for reported in table.reported if not show_runs else []:
        for column, cell in reported.cells.items():
            lines.append(_place(table, reported.key, column) | _figures(cell) | {"source": reported.source})
    return pd.DataFrame(lines)


def to_csv(table: Table, show_runs: bool = False) -> str:
    """The rows of `to_frame` as CSV."""
    return to_frame(table, show_runs).to_csv(index=False)


def to_parquet(table: Table, show_runs: bool = False) -> bytes:
    """The rows of `to_frame` as a Parquet file."""
    file = io.BytesIO()
    to_frame(table, show_runs).to_parquet(file, index=False)
    return file.getvalue()


def _place(table: Table, row: Key, column: Key) -> dict[str, Any]:
    names = [*table.row_names, *table.column_names]
    return dict(zip(names, map(show, [*row, *column[1:]]), strict=True)) | {"metric": column[0]}


def _figures(cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {"mean": None, "std": None, "n": 0, DOUBTFUL: 0}
    found: dict[str, Any] = {"mean": cell.mean, "std": cell.deviation, "n": cell.count, DOUBTFUL: cell.doubtful}
    if cell.interval:
        found |= {"low": cell.interval.low, "high": cell.interval.high, "interval": cell.interval.method}
    return found if cell.p is None else found | {"p_holm": cell.p}
