"""A table: cells of runs by row and column, and what is known of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.report.tables.layout import Layout
from vipbench.harness.report.tables.values import COSTS

OF_DATA = ("dataset", "evaluated", "evaluation", "split")  # names of rows; figures of other data do not compete
Key = tuple[Any, ...]  # of a row, or of a column, which starts with its metric


@dataclass(frozen=True)
class Value:
    """A metric of one run, None where it is undefined; `seeds` are its values of those settings, by name."""

    run: str
    seeds: Mapping[str, Any]
    value: float | None

    @property
    def seed(self) -> str:
        """The seed, and the others where they differ from it: "seed 1", "seed 1, split_seed 2"."""
        first = self.seeds.get("seed")
        others = [f"{name} {value}" for name, value in self.seeds.items() if name != "seed" and value != first]
        return ", ".join([f"seed {first}", *others])


class Missing(NamedTuple):
    """A run that is not finished: its state, and the directory that it will have."""

    state: str
    run: str


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds alone: mean and sample standard deviation (None for one run) of a metric.

    Runs in which the metric is undefined do not count; the mean of none is NaN. `doubtful` is how many of the runs kept an epoch
    that was hardly selected: one of the warm-up, or one no better on validation than the first. `shared` is how many have a
    cost that is that of several runs together. `values` are those of every run. `seedless` runs depend on no seed, as those of
    zero-shot; a `derived` cell is made of others, such as an average. `p` is of the difference from the best of its column.
    """

    mean: float
    deviation: float | None
    count: int
    doubtful: int = 0
    shared: int = 0
    values: tuple[Value, ...] = ()
    interval: Interval | None = None
    p: float | None = None
    seedless: bool = False
    derived: bool = False


@dataclass(frozen=True)
class ReportedRow:
    """A row of published figures, which no run here made: its cells by column, and its source."""

    key: Key
    cells: Mapping[Key, Cell]
    source: str


@dataclass(frozen=True)
class Table:
    """Cells by (row, column); both are tuples of values, and a column starts with its metric.

    `damaged` runs are in no cell. `missing` has the runs that are not finished by row and column (without its metric), and
    `unfinished` a line for each. `remarks` are sentences below the table.
    """

    row_names: list[str]
    column_names: list[str]
    rows: list[Key]
    columns: list[Key]
    cells: dict[tuple[Key, Key], Cell]
    damaged: int = 0
    missing: Mapping[tuple[Key, Key], Sequence[Missing]] = field(default_factory=dict)
    unfinished: Sequence[str] = ()
    reported: Sequence[ReportedRow] = ()
    remarks: Sequence[str] = ()
    layout: Layout = field(default_factory=Layout)

    def is_best(self, row: Key, column: Key) -> bool:
        """Check that a cell has the best mean of its column among rows of the same data; no cost is, and no reported figure."""
        return self.cells[row, column].mean == self._leading[column, self._data(row)][0]

    def is_second(self, row: Key, column: Key) -> bool:
        """Check that a cell has the second best mean of at least three in its column, of the same data."""
        return self.cells[row, column].mean == self._leading[column, self._data(row)][1]

    def contests(self, column: Key) -> list[list[Key]]:
        """The rows that have a cell in a column, those of the same data together."""
        groups: dict[Key, list[Key]] = {}
        for row in self.rows:
            if (row, column) in self.cells:
                groups.setdefault(self._data(row), []).append(row)
        return list(groups.values())

    def _data(self, row: Key) -> Key:
        """The values of a row that name the data it is of."""
        return tuple(value for name, value in zip(self.row_names, row, strict=True) if name in OF_DATA)

    def missing_at(self, row: Key, column: Key) -> Sequence[Missing]:
        """The runs that a cell lacks."""
        return self.missing.get((row, column[1:]), ())

    @cached_property
    def _leading(self) -> dict[tuple[Key, Key], tuple[float | None, float | None]]:
        """The best and second best mean by column and data, None where there is none."""
        leading: dict[tuple[Key, Key], tuple[float | None, float | None]] = {}
        for column in self.columns:
            for rows in self.contests(column):
                means = [self.cells[row, column].mean for row in rows if column[0] not in COSTS]
                means = [mean for mean in means if not math.isnan(mean)]
                ranked = sorted(set(means), reverse=column[0] not in LOWER_IS_BETTER)
                second = ranked[1] if len(means) > 2 and len(ranked) > 1 else None
                leading[column, self._data(rows[0])] = (ranked[0] if ranked else None), second
        return leading
