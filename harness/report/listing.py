"""List the runs of a directory: state, the settings in which they differ, metrics, path."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.report.rows import (
    planned,
    resolve_filter,
    resolve_metric,
    run_folder,
    short_name,
    unfinished,
    with_class_metrics,
)
from vipbench.harness.report.tables.make import NOT_RESULTS, SEEDS
from vipbench.harness.report.tables.values import NO_VALUE, figure, show
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.directory import find_damage, is_finished

STATE, REASON, RUN = "state", "reason", "run"
ALWAYS = ("method.name", "data.shots", "seed")
IF_VARYING = ("dataset", "backbone.name")
METRICS = ("accuracy", "macro_f1")


def list_runs(
    directory: Path, filters: Sequence[str] = (), states: Mapping[str, tuple[str, str]] | None = None
) -> pd.DataFrame:
    """A row per run of a sweep or folder, finished or not, in the order of the plan, with "state", "reason" and "run" (its path).

    States are "done", "damaged" and those of `unfinished`. Other columns: those of `read_runs`.

    Args:
        filters: "NAME=VALUE" of settings, short or whole, or of the state: all must hold.
        states: known better by name, as state and reason, for runs that are not finished.

    Raises:
        UserError: there is no run, or a filter names what runs do not have.
    """
    folder = run_folder(directory)
    done = read_runs(folder)
    found: list[dict[Any, Any]] = [{**run, STATE: "done"} for run in done.to_dict("records")]
    names = {Path(run["run"]).name for run in found}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and is_finished(path) and path.name not in names:
            found.append({RUN: str(path), STATE: "damaged", REASON: find_damage(path) or "it cannot be read"})
    for run in unfinished(directory, done):
        state, reason = (states or {}).get(Path(run["run"]).name, (run[STATE], run[REASON]))
        found.append(run | {STATE: state, REASON: reason})
    if not found:
        raise UserError(f"{directory}: no run here, finished or not")
    order = {name: place for place, name in enumerate(planned(directory))}
    found.sort(key=lambda run: order.get(Path(run["run"]).name, len(order)))
    return _filtered(pd.DataFrame(found), filters)


def _filtered(runs: pd.DataFrame, filters: Sequence[str]) -> pd.DataFrame:
    for text in filters:
        column, value = resolve_filter(text, runs)
        runs = runs[runs[column].map(show) == value]
    return runs.reset_index(drop=True)


def listing(runs: pd.DataFrame, metrics: Sequence[str] | None = None) -> list[str]:
    """Lines of a list of runs: a header, a line per run that ends in its path, how many are in each state, and reasons.

    Args:
        metrics: names; None: accuracy and macro F1, where the runs have them.
    """
    if runs.empty:
        return ["no run"]
    done = runs[runs[STATE] == "done"]
    counts = ", ".join(f"{count} {state}" for state, count in Counter(runs[STATE]).items())
    summary = f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {counts}"
    if metrics is None:
        metrics = [name for name in METRICS if f"metrics.{name}" in runs]
    elif not done.empty:
        done = with_class_metrics(done, metrics)
        runs = runs.assign(**{f"metrics.{name}": done[resolve_metric(name, done)] for name in metrics})
    settings = _settings(runs)
    header = [STATE, *map(short_name, settings), *metrics, "path"]
    rows = [header]
    for run in runs.to_dict("records"):
        values = [_shown(run.get(name)) for name in settings]
        figures = [_figure(name, run.get(f"metrics.{name}")) for name in metrics]
        rows.append([run[STATE], *values, *figures, run[RUN]])
    reasons = [
        f"{run[STATE]}: {Path(run[RUN]).name}: {run[REASON]}"
        for run in runs.to_dict("records")
        if isinstance(run.get(REASON), str) and run[REASON]
    ]
    right = range(1 + len(settings), 1 + len(settings) + len(metrics))
    return [*aligned(rows, right), "", summary, *reasons]


def _settings(runs: pd.DataFrame) -> list[str]:
    """The settings to list: the method, shots and seed, and those in which runs of one method differ."""
    always = [name for name in ALWAYS if name in runs]
    first = [name for name in IF_VARYING if name in runs and runs[name].nunique() > 1]
    if "method.name" not in runs:
        return []
    ignored = {*NOT_RESULTS, *SEEDS, STATE, REASON, *always, *IF_VARYING}
    names = [
        name
        for name in map(str, runs.columns)
        if name not in ignored and not name.startswith(("metrics.", "digests.", "run."))
    ]
    groups = [group for _, group in runs.groupby("method.name", sort=False)]
    differing = [name for name in names if any(group[name].map(show).nunique() > 1 for group in groups)]
    return [*first, always[0], *differing, *always[1:]]


def _shown(value: Any) -> str:
    return NO_VALUE if show(value) == "none" else show(value)


def _figure(metric: str, value: Any) -> str:
    return NO_VALUE if value is None or pd.isna(value) else figure(metric, float(value))


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of columns of the same width, those at the places `right` aligned there."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
