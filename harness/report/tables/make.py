"""Group runs into the cells of a table; nothing is mixed, and what is missing is counted."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
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
from vipbench.harness.report.tables.cells import Cell, Key, Table, Value
from vipbench.harness.report.tables.values import NO_VALUE, show, sort_key
from vipbench.harness.runs.collect import DOUBTFUL

METHOD = "method"  # a column of ours: the method's name, with the options in which its runs differ
RECIPE = "recipe"
SHARED = "shared"
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
    runs = with_class_metrics(runs, metrics)
    values = {metric: resolve_metric(metric, runs) for metric in metrics}
    runs.attrs = {}
    keys = row_names + column_names
    runs, missing = _labelled(runs, missing, keys)
    cells: dict[tuple[Key, Key], Cell] = {}
    read = {*keys, *values.values(), *SEEDS, "run", EVALUATION, DOUBTFUL, SHARED, "data.shots"}
    records = runs[[name for name in runs.columns if name in read]].to_dict("records")  # of few columns: runs are many
    groups: dict[Key, list[int]] = {}
    for place, run in enumerate(records):
        groups.setdefault(tuple(run[name] for name in keys), []).append(place)
    suspects = _suspects(runs, keys, groups)
    for key, places in groups.items():
        row, column = key[: len(row_names)], key[len(row_names) :]
        if key in suspects:
            _refuse_mixture(runs.iloc[places], key)
        for metric, name in values.items():
            cells[row, (metric, *column)] = _cell([records[place] for place in places], metric, name)
    lacking, unplaced = Counter[tuple[Key, Key]](), []
    for run in missing.to_dict("records"):
        key = tuple(run.get(name) for name in keys)
        if None in key:
            unplaced.append(run)
        else:
            lacking[key[: len(row_names)], key[len(row_names) :]] += 1
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
        missing=dict(lacking),
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


def _cell(group: Sequence[dict[str, Any]], metric: str, column: str) -> Cell:
    seeds = [name for name in SEEDS if name in group[0]]
    values = tuple(
        Value(
            str(result_folder(run)),
            {short_name(name): show(run[name]) for name in seeds if pd.notna(run[name])},
            None if pd.isna(run[column]) else float(run[column]),
        )
        for run in group
    )
    defined = [value.value for value in values if value.value is not None]
    mean = fmean(defined) if defined else math.nan
    deviation = stdev(defined) if len(defined) > 1 else None
    doubtful, shared = (sum(bool(run.get(mark)) for run in group) for mark in (DOUBTFUL, SHARED))
    shared = shared if metric in SHARED_COSTS else 0
    seedless = all(run.get("data.shots") == 0 for run in group)  # nothing is drawn
    return Cell(mean, deviation, len(defined), doubtful, shared, values, seedless=seedless)


def _unfinished(run: dict[str, Any]) -> str:
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


def _suspects(runs: pd.DataFrame, keys: Sequence[str], groups: Mapping[Key, Sequence[int]]) -> set[Key]:
    """The groups, by their places among the runs, in which something but the seeds differs, or that hold a seed twice."""
    first = np.empty(len(runs), int)
    for places in groups.values():
        first[list(places)] = places[0]
    differs = runs.duplicated([*keys, *(name for name in SEEDS if name in runs)]).to_numpy(copy=True)
    for name in _compared(runs):
        codes = pd.factorize(runs[name].map(show))[0]
        differs |= codes != codes[first]
    return {key for key, places in groups.items() if differs[list(places)].any()}


def _compared(runs: pd.DataFrame) -> list[str]:
    """The columns in which the runs of a cell must not differ."""
    ignored = (*NOT_RESULTS, *SEEDS, METHOD)
    return [
        name for name in map(str, runs.columns) if name not in ignored and not name.startswith(("metrics.", "run."))
    ]


def _refuse_mixture(group: pd.DataFrame, key: Key) -> None:
    where = " / ".join(map(show, key))
    for name in _compared(group):
        values = list(dict.fromkeys(show(value) for value in group[name]))
        if len(values) > 1:
            if name.startswith("digests."):
                raise UserError(_mixed_content(group, name.removeprefix("digests."), where))
            raise UserError(f"cell {where} would mix {name}={', '.join(values)}; add {name} to --rows or --columns")
    seeds = [name for name in SEEDS if name in group.columns]
    if group.groupby(seeds, dropna=False).size().max() > 1:
        raise UserError(f"cell {where} holds several runs of one seed: {', '.join(map(str, group['run']))}")


def _mixed_content(group: pd.DataFrame, kind: str, where: str) -> str:
    """Describe a cell whose runs read different datasets, backbones, symptom sets or code of a method."""
    names = {"dataset": "data.path", "backbone": "backbone.name", "symptoms": "symptoms", "method": "method.name"}
    for name in (names.get(kind, EVALUATION), EVALUATION):
        places = list(dict.fromkeys(show(value) for value in group[name])) if name in group else []
        if len(places) > 1:
            return f"cell {where} would mix {name}={', '.join(places)}; add {name} to --rows or --columns"
    name = names.get(kind, EVALUATION)
    places = list(dict.fromkeys(show(value) for value in group[name]))
    return f"cell {where} would mix runs before and after {name}={places[0]} changed in content; remove those before"
