"""A symptom set against its controls: paired comparisons as a table and as data, and the decision in plain sentences."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.evaluation.statistics import warnings
from vipbench.harness.evaluation.statistics.comparisons import Comparison, compare_over_seeds, holm
from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.report.figures.data import (
    LEAST_P,
    Group,
    metric_label,
    p_words,
    same_samples,
    signed,
    written,
)
from vipbench.harness.report.tables.evidence import statistic
from vipbench.harness.report.tables.markdown import escape, written_rows
from vipbench.harness.report.tables.values import LEVEL, NO_VALUE, PLAIN

THE_SET, CONTROL, KNOWLEDGE = "set", "control", "knowledge"  # kinds of lines
READERS = {"zero_shot": "zero-shot", "vip": "ViP"}
PLACES = {"dataset": "dataset", "backbone": "backbone.name"}  # of a group's column, with the columns of runs
ENOUGH_SEEDS = 5  # of trained runs, for tests over them

Write = Callable[[str, float], str]  # a value of a metric in words


@dataclass(frozen=True)
class Line:
    """Texts as one method reads them, with the runs that measure them.

    Attributes:
        kind: the set itself, a control, or other knowledge about the classes.
        group: its row is the method and the name of the texts.
        keys: the seed of each run, or the number of the draw of its texts; None for one that depends on neither.
    """

    kind: str
    group: Group
    keys: Sequence[int | None]

    @property
    def reader(self) -> str:
        """The method that reads the texts, in words."""
        return READERS[self.group.row[0]]

    @property
    def texts(self) -> str:
        return str(self.group.row[1])


@dataclass(frozen=True)
class Result:
    """A line with its interval, and how the set compares with it: the set minus it.

    Attributes:
        comparison: None for the set itself, and where there is nothing to compare.
        p: adjusted by Holm for all comparisons of the table.
    """

    line: Line
    value: float
    interval: Interval | None
    comparison: Comparison | None
    p: float | None

    def gain(self, metric: str) -> float:
        """The difference, positive where the set is better."""
        assert self.comparison
        return self.comparison.difference * (-1 if metric in LOWER_IS_BETTER else 1)


def compare_lines(lines: Sequence[Line], metric: str) -> list[Result]:
    """Compare the set with each other line of its reader, in pairs of runs of the same seed, or draw, and the same samples."""
    sets = {line.reader: line for line in lines if line.kind == THE_SET}
    compared = [None if line.kind == THE_SET else _compare(sets[line.reader], line, metric) for line in lines]
    adjusted = holm([None if one is None else one.p for one in compared])
    return [
        Result(line, line.group.mean(metric), _interval(line.group, metric), one, p)
        for line, one, p in zip(lines, compared, adjusted, strict=True)
    ]


def _interval(group: Group, metric: str) -> Interval | None:
    return group.interval(metric) if group.runs else None


def _compare(own: Line, other: Line, metric: str) -> Comparison | None:
    pairs = [
        (mine, theirs)
        for mine, key in zip(own.group.tested, own.keys, strict=True)
        for theirs, of_other in zip(other.group.tested, other.keys, strict=True)
        if None in (key, of_other) or key == of_other
    ]
    if not pairs or not same_samples([one for pair in pairs for one in pair]):
        return None
    clusters = pairs[0][0].stored.clusters
    return compare_over_seeds(statistic(metric), [own.of for own, _ in pairs], [of.of for _, of in pairs], clusters)


def to_markdown(results: Sequence[Result], metric: str) -> str:
    """The table for people: a line per kind of texts, and a note on reading it."""
    title = metric_label(metric)
    head = ["read by", "texts", f"{title} [95% interval]", "runs", "the set minus it [95% interval]", "p (Holm)"]
    lines = [head, ["---", "---", "---:", "---:", "---:", "---:"]]
    for result in results:
        name = f"**{result.line.texts}**" if result.line.kind == THE_SET else result.line.texts
        value = _with_interval(metric, result.value, result.interval) if result.line.group.runs else NO_VALUE
        difference = NO_VALUE
        if one := result.comparison:
            difference = _with_interval(metric, one.difference, one.interval, signed)
        count = len(result.line.group.runs)
        lines.append([result.line.reader, escape(name), value, str(count), difference, p_words(result.p)])
    return f"{written_rows(lines)}\n\n{_note(results)}\n"


def _note(results: Sequence[Result]) -> str:
    found = [one.comparison for one in results if one.comparison]
    tests = "; ".join(dict.fromkeys(one.test for one in found))
    methods = "; ".join(dict.fromkeys(one.interval.method for one in results if one.interval))
    read = next((line.group.tested[0] for line in (one.line for one in results) if line.group.runs), None)
    counted = f"n = {len(read.of.labels):,} test images. " if read else ""
    return (
        f"{counted}Runs: one per seed of ViP's training, or per draw of random texts. Intervals: {methods or 'none'}. Tests: "
        f"{tests or 'none'}, adjusted by Holm over all {sum(one.p is not None for one in results)}."
    )


def to_csv(results: Sequence[Result], metric: str) -> str:
    """A row per line, raw numbers, with the directories of its runs."""
    rows = []
    for result in results:
        comparison, interval, group = result.comparison, result.interval, result.line.group
        row: dict[str, Any] = {"read_by": result.line.reader, "texts": result.line.texts}
        row |= {"kind": result.line.kind, "metric": metric, "mean": result.value, "runs": len(group.runs)}
        row |= _ends("", interval) | {"interval": interval.method if interval else None}
        row |= {"difference": comparison.difference if comparison else None}
        row |= _ends("difference_", comparison.interval if comparison else None)
        row |= {"p": comparison.p if comparison else None, "p_holm": result.p}
        row |= {"test": comparison.test if comparison else None, "samples": comparison.samples if comparison else None}
        rows.append(row | {"run": " ".join(str(run["run"]) for run in group.runs)})
    return pd.DataFrame(rows).to_csv(index=False)


def _ends(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = (interval.low, interval.high) if interval else (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def decisions(results: Sequence[Result], metric: str) -> list[str]:
    """A sentence for each reader: does the set beat its controls, by how much, and how sure is that."""
    tests = sum(one.p is not None for one in results)
    return [
        f"{reader[0].upper()}{reader[1:]}: {_decision([one for one in results if one.line.reader == reader], metric, tests)}"
        for reader in dict.fromkeys(one.line.reader for one in results)
    ]


def _decision(results: Sequence[Result], metric: str, tests: int) -> str:
    name = next(one.line.texts for one in results if one.line.kind == THE_SET)
    controls = [one for one in results if one.line.kind == CONTROL]
    untested = [one.line.texts for one in controls if one.p is None]
    if untested:
        return f"not decided: {name} is not compared with {', '.join(untested)}, of which runs or a test are missing."
    beaten = [one for one in controls if _beats(one, metric)]
    adjusted = f"after Holm over {tests} tests"
    if len(beaten) == len(controls):
        nearest = min(beaten, key=lambda one: one.gain(metric))
        highest = max(one.p for one in beaten if one.p is not None)
        at_most = p_words(highest, equals=True) + ("" if highest < LEAST_P else " or less")
        text = f"yes, {name} beats all {len(controls)} controls, the nearest ({nearest.line.texts}) by "
        text += f"{_amount(nearest, metric)}; {at_most} {adjusted}."
    else:
        missed = [_named(one, metric) for one in controls if one not in beaten]
        text = f"no, {name} is not shown to beat {_listed(missed)} {adjusted}"
        text += f"; it beats {_listed([one.line.texts for one in beaten])}." if beaten else "; it beats no control."
    others = [_named(one, metric) for one in results if one.line.kind == KNOWLEDGE and one.comparison]
    return f"{text} Against other knowledge: {_listed(others)}." if others else text


def _beats(result: Result, metric: str) -> bool:
    return result.p is not None and result.p < LEVEL and result.gain(metric) > 0


def _named(result: Result, metric: str) -> str:
    return f"{result.line.texts} ({_amount(result, metric, signed)}, {p_words(result.p, equals=True)})"


def _amount(result: Result, metric: str, write: Write = written) -> str:
    """A difference in points, or in the unit of the metric, with its interval."""
    assert result.comparison
    unit = "" if metric in PLAIN else " points"
    interval = result.comparison.interval
    ends = f" [{written(metric, interval.low)}, {written(metric, interval.high)}]" if interval else ""
    return f"{write(metric, result.comparison.difference)}{unit}{ends}"


def thin_evidence(results: Sequence[Result]) -> list[str]:
    """Warnings where the comparison rests on little: few samples, few patients, one seed."""
    groups = [one.line.group for one in results if one.line.kind == THE_SET and one.line.group.runs]
    if not groups:
        return []
    tested = groups[0].tested[0]
    counts = np.bincount(tested.of.labels, minlength=len(tested.of.classes)).tolist()
    clusters = tested.stored.clusters
    found = warnings.few_samples(dict(zip(tested.of.classes, counts, strict=True)))
    found += warnings.few_clusters(None if clusters is None else len(np.unique(clusters)))
    trained = [group for group in groups if group.row[0] == "vip"]
    seeds = len(trained[0].runs) if trained else ENOUGH_SEEDS
    if 1 < seeds < ENOUGH_SEEDS:
        found.append(f"{seeds} seeds only: a test over so few finds large differences alone")
    return found + warnings.one_seed(seeds)


def differences(results: Iterable[Result], metric: str) -> dict[int, str]:
    """Texts for the bars of the groups that the set is compared with, by their ids."""
    return {
        id(one.line.group): f"{signed(metric, one.comparison.difference)} ({p_words(one.p, equals=True)})"
        for one in results
        if one.comparison
    }


def _with_interval(metric: str, value: float, interval: Interval | None, write: Write = written) -> str:
    shown = write(metric, value)
    return f"{shown} [{written(metric, interval.low)}, {written(metric, interval.high)}]" if interval else shown


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
