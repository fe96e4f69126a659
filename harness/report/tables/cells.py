"""A table: cells of runs by row and column, and what is known of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.report.tables.layout import Layout
from vipbench.harness.report.tables.values import COSTS

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

    `damaged` runs are in no cell. `missing` counts the runs that are not finished by row and column (without its metric), and
    `unfinished` has a line for each. `remarks` are sentences below the table.
    """

    row_names: list[str]
    column_names: list[str]
    rows: list[Key]
    columns: list[Key]
    cells: dict[tuple[Key, Key], Cell]
    damaged: int = 0
    missing: Mapping[tuple[Key, Key], int] = field(default_factory=dict)
    unfinished: Sequence[str] = ()
    reported: Sequence[ReportedRow] = ()
    remarks: Sequence[str] = ()
    layout: Layout = field(default_factory=Layout)

    def is_best(self, row: Key, column: Key) -> bool:
        """Check that a cell has the best mean of its column; no cost is, and no reported figure counts."""
        return self.cells[row, column].mean == self._leading[column][0]

    def is_second(self, row: Key, column: Key) -> bool:
        """Check that a cell has the second best mean of a column that has at least three."""
        return self.cells[row, column].mean == self._leading[column][1]

    def missing_at(self, row: Key, column: Key) -> int:
        """The count of runs that a cell lacks."""
        return self.missing.get((row, column[1:]), 0)

    @cached_property
    def _leading(self) -> dict[Key, tuple[float | None, float | None]]:
        """The best and second best mean of each column, None where there is none."""
        leading: dict[Key, tuple[float | None, float | None]] = {}
        means: dict[Key, list[float]] = {column: [] for column in self.columns}
        for (_, column), cell in self.cells.items():
            if not math.isnan(cell.mean) and column[0] not in COSTS:
                means[column].append(cell.mean)
        for column, found in means.items():
            ranked = sorted(set(found), reverse=column[0] not in LOWER_IS_BETTER)
            second = ranked[1] if len(found) > 2 and len(ranked) > 1 else None
            leading[column] = (ranked[0] if ranked else None), second
        return leading
