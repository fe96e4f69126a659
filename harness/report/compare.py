"""Compare two runs: settings, data and metrics in which they differ, the samples on which they disagree, paired tests."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.evaluation.statistics.comparisons import Comparison, compare, false_superiority, holm
from vipbench.harness.report.listing import aligned
from vipbench.harness.report.rows import EVALUATIONS
from vipbench.harness.report.tables.values import NO_VALUE, figure, show
from vipbench.harness.runs.directory import check_run, read_config, read_metrics, read_provenance
from vipbench.harness.runs.predictions import read_predicted
from vipbench.harness.system.plain_values import flatten

TESTED = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
LISTED = 20  # samples


class Difference(NamedTuple):
    """A setting, digest or metric, and its values in both runs, None where one lacks it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Samples:
    """The samples of both runs: counts by which run is right, and those on which the predictions differ.

    `disagreements` has a row per sample: id, class, first, second (predictions), right ("first", "second" or "none"), and the
    probabilities that each run gave its prediction.
    """

    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    disagreements: pd.DataFrame


@dataclass(frozen=True)
class ComparedRuns:
    """Two runs (directories of runs or of their evaluations) side by side.

    Attributes:
        settings, data: differences in config, and in the content of what was read.
        metrics: overall metrics of both, and those of each class.
        pairing: why samples are not paired, or only some of them.
        samples, tests: None and empty where they are not.
        adjusted: the p-values of `tests`, adjusted by Holm for their number.
        false_claim: the probability that the run with the higher accuracy is not the better one.
    """

    first: str
    second: str
    settings: Sequence[Difference]
    data: Sequence[Difference]
    metrics: Sequence[Difference]
    pairing: str = ""
    samples: Samples | None = None
    tests: Sequence[Comparison] = ()
    adjusted: Sequence[float | None] = ()
    false_claim: float | None = None


def compare_runs(first: Path, second: Path) -> ComparedRuns:
    """Compare two finished runs, or evaluations of runs.

    Raises:
        UserError: one is neither, or damaged.
    """
    settings = _differences(_settings(_run_of(first)), _settings(_run_of(second)))
    own, other = read_provenance(first), read_provenance(second)
    data = _differences(_content(own), _content(other))
    metrics = _differences(flatten(read_metrics(first)), flatten(read_metrics(second)), equal_too=True)
    compared = ComparedRuns(str(first), str(second), settings, data, metrics)
    if own["digests"]["dataset"] != other["digests"]["dataset"]:
        return replace(compared, pairing="tested on other data, so that samples cannot be paired")
    return _paired(compared, read_predicted(first), read_predicted(second))


def _run_of(path: Path) -> Path:
    """The run directory of a run or of an evaluation. Raises UserError where it is neither, or the run damaged."""
    folder = path.absolute().parent
    run = folder.parent if folder.name == EVALUATIONS else path
    check_run(run)
    return run


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run that count for its result."""
    return {name: value for name, value in flatten(read_config(run)).items() if not name.startswith("run.")}


def _content(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The name of the dataset and the digests of what a run read."""
    return {"dataset": provenance["dataset"], **{f"{name} (digest)": d for name, d in provenance["digests"].items()}}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], equal_too: bool = False) -> list[Difference]:
    names = dict.fromkeys([*first, *second])
    found = [Difference(name, first.get(name), second.get(name)) for name in names]
    return [one for one in found if equal_too or one.first != one.second]


def _paired(
    compared: ComparedRuns, first: tuple[Predicted, Predictions], second: tuple[Predicted, Predictions]
) -> ComparedRuns:
    """Add what needs the same samples: where they disagree, and the tests of metrics."""
    (left, own), (right, other) = first, second
    common, *at = np.intersect1d(own.ids, other.ids, return_indices=True)
    if not len(common) or set(left.classes) != set(right.classes):
        return replace(compared, pairing="tested on no common sample, or with other classes")
    left, right = left.select(at[0]), right.select(at[1])
    places = [list(right.classes).index(name) for name in left.classes]
    right = replace(
        right, logits=right.logits[:, places], labels=np.argsort(places)[right.labels], classes=left.classes
    )
    if not np.array_equal(left.labels, right.labels):
        return replace(compared, pairing="tested on samples of other labels")
    clusters = None if own.clusters is None else own.clusters[at[0]]
    known = {one.name for one in compared.metrics if one.first is not None and one.second is not None}
    found = (compare(name, left, right, clusters) for name in TESTED if name in known)
    tests = [test for test in found if test is not None]
    first_right, second_right = left.predicted == left.labels, right.predicted == right.labels
    samples = Samples(
        both_right=int(np.sum(first_right & second_right)),
        only_first=int(np.sum(first_right & ~second_right)),
        only_second=int(np.sum(~first_right & second_right)),
        both_wrong=int(np.sum(~first_right & ~second_right)),
        disagreements=_disagreements(common, left, right),
    )
    part = len(common) < max(len(own.ids), len(other.ids))
    return replace(
        compared,
        pairing=f"paired on the {len(common)} samples that both predicted" if part else "",
        samples=samples,
        tests=tests,
        adjusted=holm([test.p for test in tests]),
        false_claim=false_superiority(left, right, clusters),
    )


def _disagreements(ids: np.ndarray, first: Predicted, second: Predicted) -> pd.DataFrame:
    names = np.array(first.classes, dtype=object)
    frame = pd.DataFrame({"id": ids, "class": names[first.labels]})
    for side, of in (("first", first), ("second", second)):
        frame[side] = names[of.predicted]
        frame[f"{side}_probability"] = of.probabilities.max(axis=1)
    right = np.where(
        first.predicted == first.labels, "first", np.where(second.predicted == second.labels, "second", "none")
    )
    return frame.assign(right=right)[first.predicted != second.predicted].reset_index(drop=True)


def to_json(compared: ComparedRuns) -> dict[str, Any]:
    """Everything as JSON values, with all disagreements."""
    samples = compared.samples
    described = asdict(replace(compared, samples=None))
    for kind in ("settings", "data", "metrics"):
        described[kind] = {one.name: {"first": one.first, "second": one.second} for one in getattr(compared, kind)}
    adjusted = dict(zip([test.metric for test in compared.tests], compared.adjusted, strict=True))
    described["tests"] = [asdict(test) | {"p_holm": adjusted[test.metric]} for test in compared.tests]
    del described["adjusted"]
    if samples:
        described["samples"] = {
            name: getattr(samples, name) for name in ("both_right", "only_first", "only_second", "both_wrong")
        }
        described["disagreements"] = samples.disagreements.to_dict("records")
    return described


def to_lines(compared: ComparedRuns, most: int = LISTED) -> list[str]:
    """Lines for people: what differs, the metrics, the tests, and the first `most` samples on which the runs disagree."""
    lines = [f"A: {compared.first}", f"B: {compared.second}", ""]
    for title, found in (("config", compared.settings), ("data", compared.data)):
        rows = [[one.name, _short(one.first), _short(one.second)] for one in found]
        lines += [*aligned([[title, "A", "B"], *rows]), ""] if rows else [f"{title}: no difference", ""]
    lines += [*aligned([["metric", "A", "B", "A - B"], *_metric_rows(compared.metrics)], (1, 2, 3)), ""]
    if compared.pairing:
        lines += [f"samples: {compared.pairing}", ""]
    if compared.samples:
        lines += [*_test_lines(compared), "", *_sample_lines(compared.samples, most)]
    return lines


def _metric_rows(metrics: Sequence[Difference]) -> list[list[str]]:
    rows = []
    for name, first, second in metrics:
        if name == "samples":
            rows.append([name, show(first), show(second), ""])
            continue
        difference = "" if first is None or second is None else figure(name, first - second)
        rows.append(
            [name, *(NO_VALUE if value is None else figure(name, value) for value in (first, second)), difference]
        )
    return rows


def _test_lines(compared: ComparedRuns) -> list[str]:
    rows = [["paired test", "A - B", "95% interval", "p", "p (Holm)", "method"]]
    for test, adjusted in zip(compared.tests, compared.adjusted, strict=True):
        ends = [figure(test.metric, end) for end in (test.interval.low, test.interval.high)] if test.interval else []
        p_values = [NO_VALUE if p is None else f"{p:.2g}" for p in (test.p, adjusted)]
        between = f"[{', '.join(ends)}]" if ends else NO_VALUE
        rows.append([test.metric, figure(test.metric, test.difference), between, *p_values, test.test])
    claim = f"probability that the run of higher accuracy is not the better one: {compared.false_claim:.3f} (arXiv 2505.04720)"
    return [*aligned(rows, (1, 2, 3, 4)), claim]


def _sample_lines(samples: Samples, most: int) -> list[str]:
    counts = (
        f"samples: both right {samples.both_right}, only A {samples.only_first}, only B {samples.only_second}, "
        f"both wrong {samples.both_wrong}"
    )
    found = samples.disagreements
    if found.empty:
        return [counts, "A and B predict the same of every sample"]
    sides = {"first": "A", "second": "B", "none": "neither"}
    rows = [["sample", "class", "A", "", "B", "", "right"]]
    for row in found.head(most).to_dict("records"):
        predictions = [
            str(row["first"]),
            f"{row['first_probability']:.2f}",
            str(row["second"]),
            f"{row['second_probability']:.2f}",
        ]
        rows.append([str(row["id"]), str(row["class"]), *predictions, sides[row["right"]]])
    lines = [counts, f"A and B disagree on {len(found)}:", *aligned(rows)]
    return lines if len(found) <= most else [*lines, f"... {len(found) - most} more (--most {len(found)}, or --json)"]


def _short(value: Any) -> str:
    """A setting or the beginning of a digest, which are long."""
    text = NO_VALUE if value is None else show(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
