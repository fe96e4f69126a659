"""The evidence behind a table: 95% intervals of its cells, and remarks where it is thin."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.evaluation.statistics import warnings
from vipbench.harness.evaluation.statistics.intervals import Interval, interval_over_seeds
from vipbench.harness.report.tables.cells import Cell, Key, Table
from vipbench.harness.report.tables.text import column_title, row_values
from vipbench.harness.report.tables.values import COSTS
from vipbench.harness.runs.directory import INTERVALS
from vipbench.harness.runs.predictions import read_intervals, read_predicted

Samples = tuple[Predicted, Predictions]


def add_evidence(table: Table) -> Table:
    """Give cells of runs their intervals: of one run that of its intervals.json, else over seeds and samples together.

    There is none for averages, harmonic means and costs, nor where a run has no value or the runs have other test samples.

    Raises:
        UserError: the predictions of a run are damaged.
    """
    places: dict[tuple[str, ...], list[tuple[Key, Key]]] = {}
    for place, cell in table.cells.items():
        if is_measured(place[1], cell):
            places.setdefault(tuple(value.run for value in cell.values), []).append(place)
    cells, thin = dict(table.cells), dict[str, None]()
    for runs, of_runs in places.items():  # predictions are read once for all metrics, and not kept
        samples = [read_predicted(Path(run)) for run in runs]
        predicted, clusters = samples[0][0], samples[0][1].clusters
        counts = np.bincount(predicted.labels, minlength=len(predicted.classes)).tolist()
        thin |= dict.fromkeys(warnings.few_samples(dict(zip(predicted.classes, counts, strict=True))))
        thin |= dict.fromkeys(warnings.few_clusters(None if clusters is None else len(np.unique(clusters))))
        for place in of_runs:
            cells[place] = replace(cells[place], interval=_interval(place[1][0], runs, samples))
    found = replace(table, cells=cells)
    thin |= dict.fromkeys([*_one_seed(found), *_overlaps(found)])
    return replace(found, remarks=[*table.remarks, f"Thin evidence: {'; '.join(thin)}."] if thin else table.remarks)


def is_measured(column: Key, cell: Cell) -> bool:
    """Check that a cell's metric follows from predictions, of each of its runs."""
    known = cell.values and all(value.value is not None for value in cell.values)
    return bool(known) and not cell.derived and column[0] not in COSTS


def statistic(metric: str) -> str:
    """The name that the statistics have for a metric: "sensitivity[melanoma]" of sensitivity.melanoma."""
    name, _, of_class = metric.partition(".")
    return f"{name}[{of_class}]" if of_class else name


def _interval(metric: str, runs: Sequence[str], samples: Sequence[Samples]) -> Interval | None:
    if len(runs) == 1 and (Path(runs[0]) / INTERVALS).is_file():
        name, _, of_class = metric.partition(".")
        found = read_intervals(Path(runs[0])).get(name)
        return found.get(of_class) if isinstance(found, dict) else found
    if not all(same_samples(samples[0], other) for other in samples[1:]):
        return None
    return interval_over_seeds(statistic(metric), [predicted for predicted, _ in samples], samples[0][1].clusters)


def same_samples(first: Samples, second: Samples) -> bool:
    """Check that two runs predicted the same samples in the same order, of the same classes."""
    return (
        np.array_equal(first[1].ids, second[1].ids)
        and np.array_equal(first[0].labels, second[0].labels)
        and list(first[0].classes) == list(second[0].classes)
    )


def _one_seed(table: Table) -> list[str]:
    """A remark on the rows that have cells of one seed, though their runs depend on it."""
    rows = [row for (row, _), cell in table.cells.items() if cell.count == 1 and not cell.seedless and not cell.derived]
    named = ", ".join(dict.fromkeys(" / ".join(row_values(table, row)) for row in rows))
    return [f"{sentence} ({named})" for sentence in warnings.one_seed(1)] if rows else []


def _overlaps(table: Table) -> list[str]:
    """A remark per column in which other rows have intervals that overlap with that of the best."""
    sentences = []
    for column, rows in [(one, rows) for one in table.columns for rows in table.contests(one)]:
        best = [row for row in rows if table.is_best(row, column)]
        named = {" / ".join(row_values(table, row)): table.cells[row, column].interval for row in rows}
        if best and any(named.values()):
            found = warnings.overlapping(" / ".join(row_values(table, best[0])), named)
            sentences += [f"{column_title(table, column)}: {sentence}" for sentence in found]
    return sentences
