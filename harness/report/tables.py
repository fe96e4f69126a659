"""Comparison tables of runs: mean and sample standard deviation over seeds, as Markdown, CSV or LaTeX.

vipbench table DIR --rows method --columns shots --metric accuracy --format md
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.runs.collect import DOUBTFUL, SHARED, read_runs
from vipbench.harness.system.files import read_json

log = logging.getLogger(__name__)

NO_VALUE = "–"  # of a setting that a run does not have, such as the learning rate of one that does not train
METHOD = "method"  # a column of ours: the method's name, with the options in which its runs differ
RECIPE = "recipe"
NOT_RESULTS = ("data.path", "symptoms", "run", DOUBTFUL, SHARED)  # paths; the digests stand for the content
SEEDS = ("seed", "data.split_seed", "train.augmentation_seed")
COUNTS = ("samples",)  # in metrics.json, but no metric
# Metrics that are no fractions, none of which is best, and the format of their values.
COSTS = {
    "cost.trained": "{:,.0f}",
    "cost.fitted": "{:,.0f}",
    "cost.train_seconds": "{:.1f}",
    "cost.peak_gib": "{:.2f}",
}
SHARED_COSTS = ("cost.train_seconds", "cost.peak_gib")
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
)
DAGGER = "†"
DOUBTS = (
    f"{DAGGER}: some run kept an epoch of the warm-up, or its validation accuracy never rose above that of epoch 1."
)
DOUBLE_DAGGER = "‡"
SHARES = f"{DOUBLE_DAGGER}: some run trained together with others; seconds and memory are those of all of them."
COST_NOTE = (
    "Costs are no percentages: numbers that were trained or fitted, seconds of training, GiB of memory at the peak."
)
NOTE = "Mean ± sample standard deviation over seeds, in %; (n) runs; bold: best mean of a column; –: no run."


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds alone: mean and sample standard deviation (None for one run) of a metric.

    Runs in which the metric is undefined do not count; the mean of none is NaN. `doubtful` is how many of the runs kept an epoch
    that was hardly selected: one of the warm-up, or one no better on validation than the first. `shared` is how many have a
    cost that is that of several runs together.
    """

    mean: float
    deviation: float | None
    count: int
    doubtful: int = 0
    shared: int = 0


@dataclass(frozen=True)
class Table:
    """Cells by (row, column); both are tuples of values, and a column starts with its metric.

    `damaged` runs are in no cell.
    """

    row_names: list[str]
    column_names: list[str]
    rows: list[tuple[Any, ...]]
    columns: list[tuple[Any, ...]]
    cells: dict[tuple[tuple[Any, ...], tuple[Any, ...]], Cell]
    damaged: int = 0

    def is_best(self, row: tuple[Any, ...], column: tuple[Any, ...]) -> bool:
        """Check that a cell has the best mean of its column; no cost is."""
        if column[0] in COSTS:
            return False
        means = [cell.mean for (_, where), cell in self.cells.items() if where == column and not math.isnan(cell.mean)]
        best = min if column[0] in LOWER_IS_BETTER else max
        return bool(means) and self.cells[row, column].mean == best(means)


def load_runs(directory: Path) -> pd.DataFrame:
    """The runs of a sweep in the order of its plan, or of a plain directory of run directories.

    Raises:
        UserError: there is no finished run.
    """
    plan, inside = directory / "sweep.json", directory / "runs"
    runs = read_runs(inside if inside.is_dir() else directory)
    if runs.empty:
        damaged = f", but {runs.attrs['damaged']} damaged ones" if runs.attrs["damaged"] else ""
        raise UserError(f"{directory}: no finished run here{damaged}")
    if plan.is_file():
        order = {name: place for place, name in enumerate(_planned(plan))}
        runs = runs.sort_values("run", key=lambda paths: paths.map(lambda path: order.get(Path(path).name, len(order))))
    return runs.reset_index(drop=True)


def _planned(plan: Path) -> list[str]:
    """Names of a sweep's runs in the order of its plan, or of all its plans; none where the file is damaged."""
    try:
        content = read_json(plan)
        names = [name for part in content.get("plans", [content]) for name in part["runs"]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a run's name is text")
        return names
    except (UserError, AttributeError, KeyError, TypeError):
        log.warning("%s: damaged; runs come in the order of their names", plan)
        return []


def make_table(runs: pd.DataFrame, rows: Sequence[str], columns: Sequence[str], metrics: Sequence[str]) -> Table:
    """Group runs into cells.

    Args:
        rows, columns: names of config values, whole ("data.shots", "backbone.name") or short ("shots", "backbone");
            "method" is the method with those options in which its runs differ, and the recipe where runs differ in that, as far
            as they have no place of their own.

    Raises:
        UserError: an unknown name, or a cell would mix runs that differ in more than their seeds.
    """
    if not rows or not metrics:
        raise UserError("a table needs at least one name in --rows and one in --metric")
    damaged = runs.attrs.get("damaged", 0)
    row_names, column_names = ([_resolve(name, runs) for name in names] for names in (rows, columns))
    known = [name.removeprefix("metrics.") for name in runs.columns if name.startswith("metrics.")]
    known = [name for name in known if name not in COUNTS]
    for metric in metrics:
        if metric not in known:
            raise UserError(f"--metric: there is no metric {metric!r}; {did_you_mean(metric, known)}")
    keys = row_names + column_names
    runs = runs.assign(**{METHOD: _method_labels(runs, keys)})
    runs[keys] = runs[keys].astype(object).where(runs[keys].notna(), NO_VALUE)
    cells: dict[tuple[tuple[Any, ...], tuple[Any, ...]], Cell] = {}
    for key, group in runs.groupby(keys, sort=False):
        row, column = tuple(key[: len(row_names)]), tuple(key[len(row_names) :])
        _refuse_mixture(group, key)
        for metric in metrics:
            values = group[f"metrics.{metric}"].astype(float).dropna()
            deviation = float(values.std(ddof=1)) if len(values) > 1 else None
            doubtful, shared = (int(group[mark].sum()) if mark in group else 0 for mark in (DOUBTFUL, SHARED))
            shared = shared if metric in SHARED_COSTS else 0
            cells[row, (metric, *column)] = Cell(float(values.mean()), deviation, len(values), doubtful, shared)
    row_keys = list(dict.fromkeys(row for row, _ in cells))
    column_keys = sorted(dict.fromkeys(column[1:] for _, column in cells), key=lambda key: [*map(_sort_key, key)])
    table_columns = [(metric, *column) for metric in metrics for column in column_keys]
    return Table([*map(_short, row_names)], [*map(_short, column_names)], row_keys, table_columns, cells, damaged)


def to_markdown(table: Table) -> str:
    """A Markdown table with a note on how to read it."""
    header = _header(table)
    lines = [header, ["---"] * len(table.row_names) + ["---:"] * len(table.columns)]
    for row in table.rows:
        cells = [_text(table, row, column, "**{}**", "–", " ± ") for column in table.columns]
        lines.append([*(_show(value).replace("|", r"\|") for value in row), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_note(table)}\n"


def to_latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    header = _header(table)
    body = []
    for row in table.rows:
        cells = [_text(table, row, column, r"\textbf{{{}}}", "--", r" $\pm$ ") for column in table.columns]
        cells = [cell.replace(DAGGER, r"$^\dagger$").replace(DOUBLE_DAGGER, r"$^\ddagger$") for cell in cells]
        body.append([*(_escape(_show(value)) for value in row), *cells])
    lines = [rf"\begin{{tabular}}{{{'l' * len(table.row_names)}{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join(map(_escape, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(line) + r" \\" for line in body]
    note = _note(table).replace("±", r"$\pm$").replace("%", r"\%").replace("–", "--").replace(DAGGER, r"$\dagger$")
    note = note.replace(DOUBLE_DAGGER, r"$\ddagger$")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {note}"]) + "\n"


def to_csv(table: Table) -> str:
    """One line per cell with raw numbers: rows, columns, metric, mean, std, n."""
    lines = []
    for row in table.rows:
        for column in table.columns:
            if cell := table.cells.get((row, column)):
                named = dict(zip(table.row_names, map(_show, row), strict=True))
                named |= dict(zip(table.column_names, map(_show, column[1:]), strict=True))
                figures = {"metric": column[0], "mean": cell.mean, "std": cell.deviation, "n": cell.count}
                figures[DOUBTFUL] = cell.doubtful
                lines.append(named | figures)
    return pd.DataFrame(lines).to_csv(index=False)


FORMATS = {"md": to_markdown, "csv": to_csv, "latex": to_latex}


def _note(table: Table) -> str:
    """Note on reading a table: the cells to doubt, and how many damaged runs it leaves out."""
    sentences = [NOTE]
    if any(column[0] in COSTS for column in table.columns):
        sentences.append(COST_NOTE)
    if any(cell.shared for cell in table.cells.values()):
        sentences.append(SHARES)
    if any(cell.doubtful for cell in table.cells.values()):
        sentences.append(DOUBTS)
    if table.damaged:
        runs = "1 damaged run is" if table.damaged == 1 else f"{table.damaged} damaged runs are"
        sentences.append(f"{runs} left out.")
    return " ".join(sentences)


def _header(table: Table) -> list[str]:
    """Names of the rows, then each column's metric and values: "accuracy, shots=16"."""
    columns = []
    for metric, *values in table.columns:
        named = [f"{name}={_show(value)}" for name, value in zip(table.column_names, values, strict=True)]
        columns.append(", ".join([str(metric), *named]))
    return [*table.row_names, *columns]


def _method_labels(runs: pd.DataFrame, placed: Sequence[str]) -> pd.Series:
    """Each run's method, with the options in which runs of that method differ, and the kind of recipe where trained runs of the
    table differ in it: "vip (merge=mean, recipe=tuned)"; not those `placed`.
    """
    labels = {index: str(name) for index, name in runs["method.name"].items()}
    options = [name for name in runs.columns if name.startswith("method.") and name not in ("method.name", *placed)]
    kinds = runs[RECIPE].nunique() if RECIPE in runs and RECIPE not in placed else 0  # None is no kind
    for _, group in runs.groupby("method.name", sort=False):
        differing = [name for name in options if group[name].map(_show).nunique() > 1]
        differing += [RECIPE] if kinds > 1 and group[RECIPE].notna().any() else []
        for index, run in group[differing].iterrows():
            shown = ", ".join(f"{name.removeprefix('method.')}={_show(run[name])}" for name in differing)
            labels[index] += f" ({shown})" if shown else ""
    return pd.Series(labels)


def _resolve(name: str, runs: pd.DataFrame) -> str:
    columns = [str(column) for column in runs.columns if not str(column).startswith(("metrics.", "digests."))]
    if name == METHOD or name in columns:
        return name
    if f"{name}.name" in columns:
        return f"{name}.name"
    ends = [column for column in columns if column.rpartition(".")[2] == name]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{name!r} may be {' or '.join(ends)}; give the whole name")
    raise UserError(f"the runs have no {name!r}; {did_you_mean(name, [METHOD, *columns, *map(_short, columns)])}")


def _short(name: str) -> str:
    """The last part of a dotted name that distinguishes it: "shots" of data.shots, "backbone" of backbone.name."""
    return name.removesuffix(".name").rpartition(".")[2]


def _refuse_mixture(group: pd.DataFrame, key: tuple[Any, ...]) -> None:
    where = " / ".join(map(_show, key))
    ignored = (*NOT_RESULTS, *SEEDS, METHOD)
    for name in map(str, group.columns):
        if name in ignored or name.startswith(("metrics.", "run.")):
            continue
        values = list(dict.fromkeys(_show(value) for value in group[name]))
        if len(values) > 1:
            if name.startswith("digests."):
                raise UserError(_mixed_content(group, name.removeprefix("digests."), where))
            raise UserError(f"cell {where} would mix {name}={', '.join(values)}; add {name} to --rows or --columns")
    seeds = [name for name in SEEDS if name in group.columns]
    if group.groupby(seeds, dropna=False).size().max() > 1:
        raise UserError(f"cell {where} holds several runs of one seed: {', '.join(map(str, group['run']))}")


def _mixed_content(group: pd.DataFrame, kind: str, where: str) -> str:
    """Describe a cell whose runs read different datasets, backbones, symptom sets or code of a method."""
    name = {"dataset": "data.path", "backbone": "backbone.name", "symptoms": "symptoms", "method": "method.name"}[kind]
    places = list(dict.fromkeys(_show(value) for value in group[name]))
    if len(places) > 1:
        return f"cell {where} would mix {name}={', '.join(places)}; add {name} to --rows or --columns"
    return f"cell {where} would mix runs before and after {name}={places[0]} changed in content; remove those before"


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers in order, then words, then "all"."""
    if isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        return 0, float(value), ""
    return (2, 0.0, "") if value == "all" else (1, 0.0, str(value))


def _show(value: Any) -> str:
    """A value in words; an option that is not set, which pandas may hold as NaN, is "none"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _text(table: Table, row: Any, column: Any, bold: str, missing: str, between: str) -> str:
    cell = table.cells.get((row, column))
    if cell is None:
        return missing
    if math.isnan(cell.mean):
        return "undefined"
    form, factor = COSTS.get(column[0], "{:.2f}"), 1 if column[0] in COSTS else 100
    text = form.format(factor * cell.mean)
    text = bold.format(text) if table.is_best(row, column) else text
    deviation = "" if cell.deviation is None else between + form.format(factor * cell.deviation)
    marks = (DAGGER if cell.doubtful else "") + (DOUBLE_DAGGER if cell.shared else "")
    return f"{text}{deviation} ({cell.count}){marks}"


def _escape(text: str) -> str:
    return text.translate(LATEX)
