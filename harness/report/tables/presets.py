"""Presets: the tables that papers have, each a query that adapts to the settings in which the runs differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import harmonic_mean
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.report.groupings import FAMILY, family_place, with_groupings
from vipbench.harness.report.rows import EVALUATED, EVALUATION, OTHER_CLASSES, resolve_metric, with_evaluations
from vipbench.harness.report.tables.cells import Table
from vipbench.harness.report.tables.derive import add_average, add_harmonic_mean, spread_references
from vipbench.harness.report.tables.make import METHOD, make_table, method_options
from vipbench.harness.report.tables.values import PLAIN, show

BASE, NEW = "base", "new"
H_OF_MEANS, MEAN_OF_H = "H of means", "mean of H"
HARMONIC_NOTE = (
    "base: the classes that a run learned, by its own test; new: classes of which it learned none, by `vipbench evaluate`. "
    f"{H_OF_MEANS}: the harmonic mean of the two means beside it; {MEAN_OF_H}: the mean of the harmonic means of single runs. "
    "Papers give either."
)


@dataclass(frozen=True)
class Query:
    """A table to make: what names its rows and columns, its metrics, and what is derived.

    Attributes:
        references: put runs without training images into every column.
        average: a setting of the columns to average over, "" for none.
        evaluations: have evaluations on other data too.
        intervals: give cells their 95% intervals, and remark where evidence is thin.
        tests: test each cell against the best of its column.
        base_to_new: have the metric on base and new classes, and its harmonic means.
    """

    rows: Sequence[str] = (METHOD,)
    columns: Sequence[str] = ("shots",)
    metrics: Sequence[str] = ("accuracy",)
    references: bool = False
    average: str = ""
    evaluations: bool = False
    intervals: bool = False
    tests: bool = False
    base_to_new: bool = False


def query_table(runs: pd.DataFrame, query: Query) -> Table:
    """Make the table of a query.

    Raises:
        UserError: an unknown name, or a cell would mix runs that differ in more than their seeds.
    """
    if query.evaluations:
        if query.base_to_new:
            raise UserError("--evaluations: base_to_new has columns for evaluations; leave it out")
        runs = with_evaluations(runs)
        query = query if EVALUATED in (*query.rows, *query.columns) else replace(query, rows=(*query.rows, EVALUATED))
    metrics = query.metrics
    if query.base_to_new:
        runs, metrics = _base_to_new(runs, query.metrics), (BASE, NEW, MEAN_OF_H)
    runs = with_groupings(runs, (*query.rows, *query.columns))
    table = make_table(runs, query.rows, query.columns, metrics)
    if FAMILY in table.row_names:
        place = table.row_names.index(FAMILY)
        table = replace(table, rows=sorted(table.rows, key=lambda row: family_place(row[place])))
    if query.references:
        table = spread_references(table)
    if query.average:
        table = add_average(table, query.average)
    if query.base_to_new:
        table = add_harmonic_mean(table, H_OF_MEANS, BASE, NEW)
        table = replace(table, remarks=[*table.remarks, f"{query.metrics[0]}: {HARMONIC_NOTE}"])
    return table


def _main(runs: pd.DataFrame) -> Query:
    rows, columns = [*_varying(runs, "backbone"), METHOD], _varying(runs, "dataset", "shots")
    return Query(rows, columns, ("accuracy", "macro_f1"), references=True, intervals=True)


def _ablation(runs: pd.DataFrame) -> Query:
    rows = [*_varying(runs, "backbone"), METHOD, *method_options(runs)]
    return Query(rows, _varying(runs, "dataset", "shots"), ("accuracy", "macro_f1"), references=True)


def _few_shot(runs: pd.DataFrame) -> Query:
    datasets = _varying(runs, "dataset")
    rows = [*_varying(runs, "backbone"), METHOD]
    return Query(rows, [*datasets, "shots"], references=True, average="".join(datasets))


def _base_to_new_query(runs: pd.DataFrame) -> Query:
    datasets = _varying(runs, "dataset")
    rows, columns = [*_varying(runs, "backbone"), METHOD], [*datasets, *_varying(runs, "shots")]
    return Query(rows, columns, references=True, average="".join(datasets), base_to_new=True)


def _cost(runs: pd.DataFrame) -> Query:
    rows = [*_varying(runs, "backbone", "dataset"), METHOD]
    costs = [name for name in PLAIN if name.startswith("cost.") and f"metrics.{name}" in runs]
    if not costs:
        raise UserError("--preset cost: these runs recorded no cost; run them again with --force")
    return Query(rows, _varying(runs, "shots"), ("accuracy", *costs), references=True)


def _zoo(runs: pd.DataFrame) -> Query:
    query = _few_shot(runs)
    return replace(query, rows=(FAMILY, *query.rows), metrics=("accuracy", "auroc"))


PRESETS: Mapping[str, Callable[[pd.DataFrame], Query]] = {
    "main": _main,
    "ablation": _ablation,
    "few_shot": _few_shot,
    "base_to_new": _base_to_new_query,
    "cost": _cost,
    "zoo": _zoo,
}


def _varying(runs: pd.DataFrame, *names: str) -> list[str]:
    """Those of some settings in which runs differ."""
    columns = {"backbone": "backbone.name", "shots": "data.shots"}
    found = {name: columns.get(name, name) for name in names}
    return [name for name, column in found.items() if column in runs and runs[column].map(show).nunique() > 1]


def _base_to_new(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Runs with a metric on base and new classes and the harmonic mean of both, as "base", "new" and "mean of H".

    Raises:
        UserError: several metrics, one of which lower is better, or several evaluations of a run on new classes.
    """
    if len(metrics) != 1 or metrics[0] in (*LOWER_IS_BETTER, *PLAIN):
        raise UserError("--preset base_to_new: give one --metric, a fraction of which higher is better")
    column = resolve_metric(metrics[0], runs)
    together = with_evaluations(runs)
    new = together[together[OTHER_CLASSES]]
    if new.empty:
        raise UserError(
            "--preset base_to_new: no run was evaluated on classes other than it learned; "
            "`vipbench evaluate RUN --data DIR` does that"
        )
    for run, group in new.groupby("run"):
        if len(group) > 1:
            raise UserError(
                f"{run}: evaluated on new classes {len(group)} times: {', '.join(group[EVALUATION])}; keep one"
            )
    on_new = new.set_index("run")[column].astype(float)
    base, found = runs[column].astype(float), runs["run"].map(on_new).astype(float)
    means = [_harmonic(*pair) for pair in zip(base, found, strict=True)]
    added: dict[str, Any] = {f"metrics.{BASE}": base, f"metrics.{NEW}": found, f"metrics.{MEAN_OF_H}": means}
    attrs = runs.attrs | {"damaged": together.attrs["damaged"]}
    runs = runs.assign(**added)
    runs.attrs = attrs
    return runs


def _harmonic(first: float, second: float) -> float | None:
    return harmonic_mean([first, second]) if pd.notna(first) and pd.notna(second) else None
