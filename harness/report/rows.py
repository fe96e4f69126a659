"""Runs as rows, for tables and lists: the finished ones, what was evaluated on other data, and those that are not finished."""

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.data.names import is_safe_name
from vipbench.harness.errors import UserError, did_you_mean, shortened
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.directory import (
    CONFIG,
    METRICS,
    PARTIAL,
    PREDICTIONS,
    failure,
    is_finished,
    is_running,
    read_classes,
    read_metrics,
    read_provenance,
)
from vipbench.harness.system.files import read_json, read_yaml
from vipbench.harness.system.plain_values import flatten

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"  # in a run directory; see harness/runs/transfer.py
EVALUATED, EVALUATION, OTHER_CLASSES = "evaluated", "evaluation", "other_classes"  # columns of `with_evaluations`
PLAN, RUNS, CONFIGS, FAILED = "sweep.json", "runs", "configs", "failed"  # of a sweep


def load_runs(*directories: Path) -> pd.DataFrame:
    """The finished runs of sweeps, each in the order of its plan, or of plain directories of run directories.

    Columns are those of `read_runs`, and "directory" (the one of `directories`). In `attrs`: "damaged", how many runs are, and
    "missing", the rows of `unfinished`.

    Raises:
        UserError: there is no finished run in one of them.
    """
    found = [_load(directory) for directory in directories]
    attrs: dict[Hashable | None, Any] = {
        "damaged": sum(runs.attrs["damaged"] for runs in found),
        "missing": [row for runs in found for row in runs.attrs["missing"]],
    }
    for runs in found:
        runs.attrs = {}
    together = found[0] if len(found) == 1 else pd.concat(found)
    together = together.reset_index(drop=True)
    together.attrs = attrs
    return together


def _load(directory: Path) -> pd.DataFrame:
    runs = read_runs(run_folder(directory))
    damaged = runs.attrs["damaged"]
    if runs.empty:
        raise UserError(f"{directory}: no finished run here" + (f", but {damaged} damaged ones" if damaged else ""))
    if names := planned(directory):
        order = {name: place for place, name in enumerate(names)}
        runs = runs.sort_values("run", key=lambda paths: paths.map(lambda path: order.get(Path(path).name, len(order))))
    runs["directory"] = str(directory)
    runs.attrs = {"damaged": damaged, "missing": unfinished(directory, runs)}
    return runs


def run_folder(directory: Path) -> Path:
    """The folder of the run directories of a sweep, or the directory itself."""
    return directory / RUNS if (directory / RUNS).is_dir() else directory


def planned(directory: Path) -> list[str]:
    """Names of a sweep's runs in the order of its plan, or of all its plans; none without one, or where the file is damaged."""
    plan = directory / PLAN
    if not plan.is_file():
        return []
    try:
        content = read_json(plan)
        names = [name for part in content.get("plans", [content]) for name in part["runs"]]
        if not all(isinstance(name, str) and is_safe_name(name) for name in names):
            raise TypeError("a run's name is that of a folder")
        return list(dict.fromkeys(names))
    except (UserError, AttributeError, KeyError, TypeError):
        log.warning("%s: damaged; runs come in the order of their names", plan)
        return []


def unfinished(directory: Path, finished: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each run that a sweep planned, or that was begun, and is not finished.

    It has the values of its config under dotted names, "dataset" and "recipe" as `finished` runs have them, "run" (the path that
    it will have), "directory", "state" ("failed", "running", "interrupted" or "pending") and "reason" (of its failure). A config
    that cannot be read gives no values.
    """
    folder = run_folder(directory)
    datasets = dict(zip(finished["data.path"], finished["dataset"], strict=True)) if "data.path" in finished else {}
    begun = [path.name.removesuffix(PARTIAL) for path in sorted(folder.glob(f"*{PARTIAL}")) if path.is_dir()]
    rows = []
    for name in dict.fromkeys([*planned(directory), *begun]):
        run, partial = folder / name, folder / (name + PARTIAL)
        if is_finished(run):
            continue
        reason = failure(run) or _recorded(directory / FAILED / f"{name}.json")
        state = "interrupted" if partial.is_dir() else "pending"
        state = "running" if is_running(run) else "failed" if reason else state
        row = _planned_config(partial / CONFIG, directory / CONFIGS / f"{name}.yaml")
        if row:
            row["dataset"] = datasets.get(row.get("data.path"))
            if "recipe" in finished:  # runs of an earlier version do not name that of the paper
                row.setdefault("recipe", "published" if "train.lr" in row else None)
        rows.append(row | {"run": str(run), "directory": str(directory), "state": state, "reason": reason})
    return rows


def _recorded(record: Path) -> str | None:
    """The reason that a sweep recorded of a run that failed."""
    if not record.is_file():
        return None
    try:
        return str(read_json(record)["error"])
    except (UserError, KeyError, TypeError):
        return f"{record} is damaged, so that why it failed is not known"


def _planned_config(*places: Path) -> dict[str, Any]:
    for place in places:
        if place.is_file():
            try:
                return flatten(read_yaml(place))
            except UserError as error:
                log.warning("%s", error)
    return {}


def with_evaluations(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs, each with a further row per dataset on which `vipbench evaluate` scored it.

    The rows have "evaluated" (the name of the dataset that the metrics are of), "split", "evaluation" (the folder's name, "" for
    the run's own test), "digests.evaluated" and "other_classes" (whether it has none of the classes that the run learned). An
    evaluation that is damaged is named on the screen and counted in `attrs["damaged"]`.
    """
    rows, damaged = [], runs.attrs.get("damaged", 0)
    for own in runs.to_dict("records"):
        run = Path(own["run"])
        place = {EVALUATED: own["dataset"], "split": "test", EVALUATION: "", OTHER_CLASSES: False}
        rows.append(own | place | {"digests.evaluated": own["digests.dataset"]})
        config = {name: value for name, value in own.items() if not str(name).startswith("metrics.")}
        for path in sorted((run / EVALUATIONS).glob("*/")):
            if path.name.startswith("."):  # one that is being written
                continue
            try:
                rows.append(config | _evaluation(run, path))
            except UserError as error:
                damaged += 1
                log.warning("left out: %s", error)
    together = pd.DataFrame(rows)
    together.attrs = runs.attrs | {"damaged": damaged}
    return together


def _evaluation(run: Path, path: Path) -> dict[str, Any]:
    if not (path / PREDICTIONS).is_file():
        raise UserError(f"{path / PREDICTIONS}: missing; evaluate the run again")
    provenance, metrics = read_provenance(path), read_metrics(path)
    digests = provenance["digests"]
    row: dict[str, Any] = {f"metrics.{name}": value for name, value in metrics.items() if not isinstance(value, dict)}
    return row | {
        EVALUATED: provenance["dataset"],
        "split": provenance.get("split", "test"),
        EVALUATION: path.name,
        OTHER_CLASSES: not set(read_classes(run)) & set(read_classes(path)),
        "digests.evaluated": digests["dataset"],
        "digests.symptoms": digests["symptoms"],
    }


def result_folder(run: Any) -> Path:
    """The folder with the metrics and predictions of a row: the run directory, or that of the evaluation.

    Raises:
        UserError: the evaluation, which a config may hold as a key of its own, is no folder's name.
    """
    folder, evaluation = Path(run["run"]), run.get(EVALUATION)
    if not isinstance(evaluation, str) or not evaluation:
        return folder
    if not is_safe_name(evaluation):
        raise UserError(f"{folder}: {shortened(evaluation)} cannot be the name of an evaluation; remove or rename it")
    return folder / EVALUATIONS / evaluation


def with_class_metrics(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Runs, with columns for the metrics of one class among `metrics`, such as "sensitivity.melanoma".

    Raises:
        UserError: no run has such a class.
    """
    wanted = [name for name in metrics if "." in name and f"metrics.{name}" not in runs]
    if not wanted:
        return runs
    found = [read_metrics(result_folder(run)) for run in runs.to_dict("records")]
    columns: dict[str, Any] = {}
    for name in wanted:
        metric, _, of_class = name.partition(".")
        by_class = [value for value in (one.get(metric) for one in found) if isinstance(value, dict)]
        known = dict.fromkeys(key for values in by_class for key in values)
        if of_class not in known:
            named = sorted({key for one in found for key, value in one.items() if isinstance(value, dict)})
            choices = [f"{metric}.{one}" for one in known]
            hint = did_you_mean(name, choices) if known else f"metrics by class are {', '.join(named) or 'none'}"
            raise UserError(f"--metric: {METRICS} of no run has {name!r}; {hint}")
        columns[f"metrics.{name}"] = [
            value.get(of_class) if isinstance(value := one.get(metric), dict) else None for one in found
        ]
    together = runs.assign(**columns)
    together.attrs = runs.attrs
    return together


def resolve_name(name: str, runs: pd.DataFrame, ours: Sequence[str] = ()) -> str:
    """The column of a config value given whole ("data.shots") or short ("shots", "backbone"); one of `ours` is itself.

    Raises:
        UserError: there is none, or there are several.
    """
    columns = [str(column) for column in runs.columns if not str(column).startswith(("metrics.", "digests."))]
    if name in ours or name in columns:
        return name
    if f"{name}.name" in columns:
        return f"{name}.name"
    ends = [column for column in columns if column.rpartition(".")[2] == name]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{name!r} may be {' or '.join(ends)}; give the whole name")
    raise UserError(f"the runs have no {name!r}; {did_you_mean(name, [*ours, *columns, *map(short_name, columns)])}")


def resolve_filter(text: str, runs: pd.DataFrame) -> tuple[str, str]:
    """The column and the value of a filter "NAME=VALUE" of a config value, whole or short.

    Raises:
        UserError: it has no such form, or the runs have no such column.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r}: a filter is NAME=VALUE, such as method=vip or shots=16")
    return resolve_name(name, runs), value


def short_name(name: str) -> str:
    """The last part of a dotted name that distinguishes it: "shots" of data.shots, "backbone" of backbone.name."""
    return name.removesuffix(".name").rpartition(".")[2]


def resolve_metric(name: str, runs: pd.DataFrame) -> str:
    """The column of a metric. Raises UserError where the runs have none of that name."""
    known = [str(column).removeprefix("metrics.") for column in runs.columns if str(column).startswith("metrics.")]
    known = [one for one in known if one != "samples"]
    if name not in known:
        raise UserError(f"--metric: there is no metric {name!r}; {did_you_mean(name, known)}")
    return f"metrics.{name}"
