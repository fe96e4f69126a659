"""Runs as figures read them: filtered, grouped into those that differ in their seeds alone, with predictions and intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER, Predicted
from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.evaluation.statistics.intervals import Interval, interval_over_seeds
from vipbench.harness.report.figures.registry import Query
from vipbench.harness.report.groupings import with_groupings
from vipbench.harness.report.rows import resolve_filter, resolve_name, with_class_metrics
from vipbench.harness.report.tables import load_runs, make_table
from vipbench.harness.report.tables.evidence import statistic
from vipbench.harness.report.tables.make import METHOD
from vipbench.harness.report.tables.values import COSTS, NO_VALUE, PLAIN, run_words, sample_words, show
from vipbench.harness.runs.collect import rows_of
from vipbench.harness.runs.directory import is_finished
from vipbench.harness.runs.predictions import read_intervals, read_predicted

NAMES = {
    "auroc": "AUROC",
    "aurc": "AURC",
    "ece": "ECE",
    "mcc": "MCC",
    "macro_f1": "macro F1",
    "mae": "MAE",
    "classwise_ece": "class-wise ECE",
}

LEAST_P = 0.001  # smaller p-values are not told apart


class Tested(NamedTuple):
    """The predictions of a run's test split, as statistics take them and as they are stored."""

    of: Predicted
    stored: Predictions

    @property
    def columns(self) -> dict[str, Sequence[str | None]]:
        """[N] values each of what the samples may be grouped by: their class, the patient, metadata."""
        return {**self.stored.groups, "class": [self.of.classes[label] for label in self.of.labels]}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        row, column: values that name the line or bar, and the panel or point.
        runs: rows of `load_runs`.
    """

    row: tuple[Any, ...]
    column: tuple[Any, ...]
    runs: list[dict[str, Any]]

    @property
    def label(self) -> str:
        return " / ".join(shown(value) for value in self.row)

    @cached_property
    def tested(self) -> list[Tested]:
        """The predictions of each run, read once."""
        return [read_tested(Path(run["run"])) for run in self.runs]

    def values(self, metric: str) -> np.ndarray:
        """The metric of each run, without those where it is undefined."""
        found = np.array([run.get(f"metrics.{metric}") for run in self.runs], dtype=float)
        return found[~np.isnan(found)]

    def mean(self, metric: str) -> float:
        values = self.values(metric)
        return float(values.mean()) if len(values) else math.nan

    def interval(self, metric: str) -> Interval | None:
        """The 95% interval of the mean; None where the metric has none, or the runs were not tested on the same samples."""
        if len(self.runs) == 1 and isinstance(found := read_intervals(Path(self.runs[0]["run"])).get(metric), Interval):
            return found
        if metric in COSTS or len(self.values(metric)) < len(self.runs):
            return None
        return self.interval_of(statistic(metric))

    def interval_of(self, name: str) -> Interval | None:
        """The 95% interval of a statistic's mean, from the predictions; None as for `interval`."""
        if not same_samples(self.tested):
            return None
        return interval_over_seeds(name, [own.of for own in self.tested], self.tested[0].stored.clusters)


def load(directory: Path, filters: Sequence[str] = ()) -> pd.DataFrame:
    """The runs of a sweep, of a directory of runs, or the one run that the directory is, as rows.

    Args:
        filters: "NAME=VALUE", such as "method=vip", of config values.

    Raises:
        UserError: there is none, or none that the filters leave.
    """
    runs = rows_of([directory]) if is_finished(directory) else load_runs(directory)
    if runs.empty:
        raise UserError(f"{directory}: a damaged run; remove it, or run it again with --force")
    for text in filters:
        column, value = resolve_filter(text, runs)
        values = [shown(own) for own in runs[column]]
        if value not in values:
            raise UserError(f"{text}: no run has it; the runs have {', '.join(list(dict.fromkeys(values))[:12])}")
        attrs = runs.attrs
        runs = runs[[own == value for own in values]].reset_index(drop=True)
        runs.attrs = attrs
    return runs


def groups(query: Query, columns: Sequence[str]) -> list[Group]:
    """The groups of a query, in the order of its runs. Raises UserError where one would mix more than seeds."""
    rows = list(query.rows)
    runs = with_groupings(with_class_metrics(query.runs, [query.metric]), (*rows, *columns))
    names = [resolve_name(name, runs, [METHOD]) for name in (*rows, *columns)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice} names a panel or point already; leave it out of --rows or --columns")
    table = make_table(runs, rows, list(columns), [query.metric])  # refuses what cannot be compared
    by_path: dict[str, Any] = {str(run["run"]): run for run in runs.to_dict("records")}
    return [
        Group(row, tuple(column[1:]), [by_path[value.run] for value in table.cells[row, column].values])
        for row in table.rows
        for column in table.columns
        if (row, column) in table.cells
    ]


def one_group(query: Query, kind: str) -> Group:
    """The one group of runs of a query. Raises UserError where there are several (names them)."""
    found = groups(query, ["dataset", "backbone", "shots"])
    if len(found) > 1:
        names = [f"{group.label} {shown(group.column[2])} shots" for group in found[:6]]
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(
            f"{kind} shows one method on one dataset, and here are {'; '.join(names)}{more}; "
            "narrow it down: method=NAME shots=N, or name a run directory"
        )
    return found[0]


def read_tested(run: Path) -> Tested:
    """Read the predictions of a run. Raises UserError where they are damaged."""
    return Tested(*read_predicted(run))


def same_samples(tested: Sequence[Tested]) -> bool:
    """Check that all predictions are of the same samples in the same order."""
    return all(np.array_equal(own.stored.ids, tested[0].stored.ids) for own in tested)


def shown(value: Any) -> str:
    """A config value in words; a path is its last part."""
    text = show(value)
    return Path(text).name if "/" in text and Path(text).is_absolute() else text


def percent(metric: str, value: Any) -> Any:
    """A value of a metric as charts show it: a fraction in per cent."""
    return value if metric in PLAIN else 100 * value


def written(metric: str, value: float) -> str:
    """A value of a metric as charts write it: with one decimal where it is in per cent."""
    return PLAIN[metric].format(value) if metric in PLAIN else f"{100 * value:.1f}"


def signed(metric: str, difference: float) -> str:
    """A difference of a metric as charts write it, always with its sign."""
    return f"{'' if difference < 0 else '+'}{written(metric, difference)}"


def p_words(p: float | None, equals: bool = False) -> str:
    """A p-value as it is written: "< 0.001", "0.012"; with `equals` as in a sentence, "p = 0.012"."""
    if p is None:
        return "no p-value" if equals else NO_VALUE
    if p < LEAST_P:
        return f"p < {LEAST_P}" if equals else f"< {LEAST_P}"
    return f"p = {p:.3f}" if equals else f"{p:.3f}"


def metric_label(metric: str) -> str:
    """The name of a metric on an axis."""
    name = NAMES.get(metric, metric.replace("_", " ").replace(".", " of "))
    unit = "" if metric in PLAIN else " (%)"
    return f"{name}{unit}" + (", lower is better" if metric in LOWER_IS_BETTER else "")


def sample_note(found: Sequence[Group]) -> str:
    """The n of a chart: test images, and seeds per point."""
    samples = (len(own.of.labels) for group in found for own in group.tested)
    return sample_words(samples, (len(group.runs) for group in found))


def runs_note(found: Sequence[Group]) -> str:
    """The number of runs in each group: "1 run", "2–3 runs (seeds)"."""
    return run_words(len(group.runs) for group in found)


def interval_note(intervals: Sequence[Interval | None], what: str) -> str:
    """A sentence on the intervals of a chart and how they were made."""
    methods = list(dict.fromkeys(own.method for own in intervals if own))
    lacking = sum(own is None for own in intervals)
    if not methods:
        return f"no {what}: the metric has no interval here."
    gap = f" ({lacking} without one)" if lacking else ""
    return f"{what}: 95% intervals, {', '.join(methods)}{gap}."


def damage_note(query: Query) -> str:
    """A sentence on the runs that a chart lacks; "" where it lacks none."""
    damaged, missing = query.runs.attrs.get("damaged", 0), len(query.runs.attrs.get("missing", ()))
    parts = [f"{count} {state}" for count, state in ((damaged, "damaged"), (missing, "unfinished")) if count]
    return f" Left out: {' and '.join(parts)} runs." if parts else ""
