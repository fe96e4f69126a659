"""Values of tables as text, and metrics: their unit, and which way is better."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

NO_VALUE = "–"  # of a setting that a run does not have, such as the learning rate of one that does not train
LEVEL = 0.05  # of paired tests
AVERAGE = "average"  # a column of ours: the mean over the values of a setting
# Metrics that are no fractions, and the format of their values; of costs none is best.
COSTS = {
    "cost.trained": "{:,.0f}",
    "cost.fitted": "{:,.0f}",
    "cost.train_seconds": "{:.1f}",
    "cost.peak_gib": "{:.2f}",
}
COEFFICIENTS = {"mcc": "{:.3f}", "aurc": "{:.3f}", "quadratic_kappa": "{:.3f}", "mae": "{:.3f}"}
PLAIN = {**COEFFICIENTS, **COSTS}


def figure(metric: str, value: float) -> str:
    """A value of a metric as it is written: a fraction in per cent."""
    return PLAIN[metric].format(value) if metric in PLAIN else f"{100 * value:.2f}"


def show(value: Any) -> str:
    """A value in words; an option that is not set, which pandas may hold as NaN, is "none"."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "none"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def sample_words(samples: Iterable[int], runs: Iterable[int]) -> str:
    """The n of a chart, from the test images of its runs and the runs of its points; there is one of each at least."""
    return f"n = {_range(samples)} test images, {run_words(runs)} each"


def run_words(runs: Iterable[int]) -> str:
    """The number of runs of each point of a chart: "1 run", "2–3 runs (seeds)"."""
    counts = _range(runs)
    return f"{counts} {'run' if counts == '1' else 'runs (seeds)'}"


def _range(counts: Iterable[int]) -> str:
    ordered = sorted(set(counts))
    return "–".join(dict.fromkeys([f"{ordered[0]:,}", f"{ordered[-1]:,}"]))


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers in order, then words, then "all", then the average."""
    if isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        return 0, float(value), ""
    last = {"all": 2, AVERAGE: 3}.get(str(value), 1)
    return last, 0.0, str(value) if last == 1 else ""
