"""Group runs into the cells of a table; nothing is mixed, and what is missing is counted."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.report.rows import (
    EVALUATION,
    OTHER_CLASSES,
    resolve_metric,
    resolve_name,
    result_folder,
    short_name,
    with_class_metrics,
)
from vipbench.harness.report.tables.cells import Cell, Key, Missing, Table, Value
from vipbench.harness.report.tables.values import NO_VALUE, show, sort_key
from vipbench.harness.runs.collect import DOUBTFUL, SHARED

Run = Mapping[Any, Any]  # a row of runs
METHOD = "method"  # a column of ours: the method's name, with the options in which its runs differ
RECIPE = "recipe"
SHARED_COSTS = ("cost.train_seconds", "cost.peak_gib")
# Paths and marks; the digests stand for the content.
NOT_RESULTS = ("data.path", "symptoms", "run", "directory", EVALUATION, OTHER_CLASSES, DOUBTFUL, SHARED)
SEEDS = ("seed", "data.split_seed", "train.augmentation_seed")


def make_table(runs: pd.DataFrame, rows: Sequence[str], columns: Sequence[str], metrics: Sequence[str]) -> Table:
    """Group runs into cells.

    Args:
        rows, columns: names of config values, whole ("data.shots", "backbone.name") or short ("shots", "backbone");
            "method" is the method with those options in which its runs differ, and the recipe where runs differ in that, as far
            as they have no place of their own.
        metrics: names; one of a class is "sensitivity.melanoma".

    Raises:
        UserError: an unknown name, or a cell would mix runs that differ in more than their seeds.
    """
    if not rows or not metrics:
        raise UserError("a table needs at least one name in --rows and one in --metric")
    damaged, missing = runs.attrs.get("damaged", 0), pd.DataFrame(runs.attrs.get("missing", []))
    row_names, column_names = ([resolve_name(name, runs, [METHOD]) for name in names] for names in (rows, columns))
    runs = with_class_metrics(runs, metrics).copy(deep=False)
    runs.attrs = {}  # which pandas would copy and compare at every step
    values = {metric: resolve_metric(metric, runs) for metric in metrics}
    keys = row_names + column_names
    runs, missing = _labelled(runs, missing, keys)
    groups: dict[Key, list[Run]] = {}
    for run in runs.to_dict("records"):  # grouping by pandas takes milliseconds for each cell
        groups.setdefault(tuple(run[name] for name in keys), []).append(run)
    bound, cells = _bound_columns(runs), dict[tuple[Key, Key], Cell]()
    for key, group in groups.items():
        row, column = key[: len(row_names)], key[len(row_names) :]
        _refuse_mixture(group, key, bound)
        behind = [(str(result_folder(run)), _seeds(run)) for run in group]
        for metric, name in values.items():
            cells[row, (metric, *column)] = _cell(group, behind, metric, name)
    lacking: dict[tuple[Key, Key], list[Missing]] = {}
    placed = missing.dropna(subset=keys) if set(keys) <= set(missing) else missing.iloc[:0]  # configs that can be read
    for run in placed.to_dict("records"):
        key = tuple(run[name] for name in keys)
        lacking.setdefault((key[: len(row_names)], key[len(row_names) :]), []).append(Missing(run["state"], run["run"]))
    places = [*((row, column[1:]) for row, column in cells), *lacking]
    row_keys = list(dict.fromkeys(row for row, _ in places))
    column_keys = sorted(dict.fromkeys(column for _, column in places), key=lambda key: [*map(sort_key, key)])
    return Table(
        row_names=[*map(short_name, row_names)],
        column_names=[*map(short_name, column_names)],
        rows=row_keys,
        columns=[(metric, *column) for metric in metrics for column in column_keys],
        cells=cells,
        damaged=damaged,
        missing=lacking,
        unfinished=[_unfinished(run) for run in missing.to_dict("records")],
    )


def method_options(runs: pd.DataFrame, placed: Sequence[str] = ()) -> list[str]:
    """The options in which runs of one method differ, but for those `placed`."""
    options = [str(name) for name in runs.columns if str(name).startswith("method.")]
    differing: dict[str, None] = {}
    for _, group in runs.groupby("method.name", sort=False):
        differing |= dict.fromkeys(_differing(group, options, placed))
    return list(differing)


def _differing(group: pd.DataFrame, options: Sequence[str], placed: Sequence[str]) -> list[str]:
    return [
        name
        for name in options
        if name not in ("method.name", *placed) and name in group and group[name].map(show).nunique() > 1
    ]


def _labelled(runs: pd.DataFrame, missing: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Finished runs and missing ones with "method", and `NO_VALUE` in the keys of those that lack a setting."""
    readable = missing[missing["method.name"].notna()] if "method.name" in missing else missing.iloc[:0]
    known = [name for name in runs.columns if name in readable]
    labels = _method_labels(pd.concat([runs, readable[known]], ignore_index=True), keys)
    runs = runs.assign(**{METHOD: labels[: len(runs)].to_numpy()})
    readable = readable.assign(**{METHOD: labels[len(runs) :].to_numpy()})
    for frame in (runs, readable):
        present = [key for key in keys if key in frame]
        frame[present] = frame[present].astype(object).where(frame[present].notna(), NO_VALUE)
    unreadable = missing.drop(readable.index)
    return runs, pd.concat([readable, unreadable]) if len(unreadable) else readable


def _seeds(run: Run) -> dict[str, str]:
    return {short_name(name): show(run[name]) for name in SEEDS if pd.notna(run.get(name))}


def _cell(group: Sequence[Run], behind: Sequence[tuple[str, dict[str, str]]], metric: str, column: str) -> Cell:
    """The cell of runs, each with its folder and its seeds."""
    figures: list[float | None] = [None if pd.isna(run[column]) else float(run[column]) for run in group]
    values = [Value(folder, seeds, value) for (folder, seeds), value in zip(behind, figures, strict=True)]
    defined = [one for one in figures if one is not None]
    mean = float(np.mean(defined)) if defined else math.nan
    deviation = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    doubtful, shared = (sum(int(run[mark]) for run in group if pd.notna(run.get(mark))) for mark in (DOUBTFUL, SHARED))
    shared = shared if metric in SHARED_COSTS else 0
    seedless = all(run.get("data.shots") == 0 for run in group)  # nothing is drawn
    return Cell(mean, deviation, len(defined), doubtful, shared, tuple(values), seedless=seedless)


def _unfinished(run: Run) -> str:
    """A line for a run that is not finished: state, name and reason."""
    reason = f": {shortened(run['reason'], 200)}" if isinstance(run.get("reason"), str) else ""
    return f"{run['state']}: {Path(run['run']).name}{reason}"


def _method_labels(runs: pd.DataFrame, placed: Sequence[str]) -> pd.Series:
    """Each run's method, with the options in which runs of that method differ, and the kind of recipe where trained runs of the
    table differ in it: "vip (merge=mean, recipe=tuned)"; not those `placed`.
    """
    labels = {index: str(name) for index, name in runs["method.name"].items()}
    options = [str(name) for name in runs.columns if str(name).startswith("method.")]
    kinds = runs[RECIPE].nunique() if RECIPE in runs and RECIPE not in placed else 0  # None is no kind
    for _, group in runs.groupby("method.name", sort=False):
        differing = _differing(group, options, placed)
        differing += [RECIPE] if kinds > 1 and group[RECIPE].notna().any() else []
        for index, run in group[differing].iterrows():
            shown = ", ".join(f"{name.removeprefix('method.')}={show(run[name])}" for name in differing)
            labels[index] += f" ({shown})" if shown else ""
    return pd.Series(labels)


def _bound_columns(runs: pd.DataFrame) -> list[str]:
    """The columns in which the runs differ that those of a cell must have in common."""
    ignored = (*NOT_RESULTS, *SEEDS, METHOD)
    columns = [name for name in map(str, runs.columns) if name not in ignored]
    columns = [name for name in columns if not name.startswith(("metrics.", "run."))]
    return [name for name in columns if runs[name].map(show).nunique() > 1]


def _refuse_mixture(group: Sequence[Run], key: Key, bound: Sequence[str]) -> None:
    where = " / ".join(map(show, key))
    for name in bound:
        values = _shown(group, name)
        if len(values) > 1:
            if name.startswith("digests."):
                raise UserError(_mixed_content(group, name.removeprefix("digests."), where))
            raise UserError(f"cell {where} would mix {name}={', '.join(values)}; add {name} to --rows or --columns")
    if len({tuple(show(run.get(name)) for name in SEEDS) for run in group}) < len(group):
        paths = ", ".join(str(run["run"]) for run in group)
        raise UserError(f"cell {where} holds several runs of one seed: {paths}")


def _mixed_content(group: Sequence[Run], kind: str, where: str) -> str:
    """Describe a cell whose runs read different datasets, backbones, symptom sets or code of a method."""
    names = {"dataset": "data.path", "backbone": "backbone.name", "symptoms": "symptoms", "method": "method.name"}
    name = names.get(kind, EVALUATION)
    for differing in (name, EVALUATION):
        places = _shown(group, differing)
        if len(places) > 1:
            return f"cell {where} would mix {differing}={', '.join(places)}; add {differing} to --rows or --columns"
    place = _shown(group, name)[0]
    return f"cell {where} would mix runs before and after {name}={place} changed in content; remove those before"


def _shown(group: Sequence[Run], name: str) -> list[str]:
    """The values of a column, each once."""
    return list(dict.fromkeys(show(run.get(name)) for run in group))
