"""Collect many run directories as rows of one table."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipbench.harness.errors import UserError
from vipbench.harness.runs.directory import (
    PROVENANCE,
    check_run,
    is_finished,
    read_config,
    read_metrics,
    read_provenance,
)
from vipbench.harness.system.plain_values import flatten, is_number

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

DOUBTFUL, SHARED = "doubtful", "shared"  # columns of `read_runs`
TOGETHER = "runs_together"  # in "cost" of provenance.json
COSTS = ("trained", "fitted", "train_seconds", "peak_gib")  # numbers of "cost" in provenance.json


def read_runs(directory: Path) -> "pd.DataFrame":
    """One row per finished run directly under a directory, in the order of their names.

    A damaged run is named on the screen and left out; how many were is `attrs["damaged"]`.

    Columns: every scalar of the resolved config under its dotted name ("seed", "data.shots", "method.name", ...), every
    overall metric as "metrics.accuracy" and so on, the numbers of the cost as "metrics.cost.train_seconds" and so on,
    "digests.dataset", "digests.backbone", "digests.symptoms", "digests.method" (of plugins' methods), "dataset" (its name),
    "run" (the path), "doubtful" (whether the selection of an epoch is, see
    `vipbench.harness.training.loop.BestEpoch.warnings`) and "shared" (whether its cost is that of several runs together).
    "recipe" is None for runs that train nothing.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory of runs")
    return rows_of([path for path in sorted(directory.iterdir()) if path.is_dir() and is_finished(path)])


def rows_of(runs: Sequence[Path]) -> "pd.DataFrame":
    """One row per finished run, as `read_runs` gives them."""
    import pandas as pd

    rows, damaged = [], 0
    for path in runs:
        try:
            check_run(path)
            rows.append(_row(path))
        except UserError as error:
            damaged += 1
            log.warning("left out: %s", error)
    found = pd.DataFrame(rows)
    found.attrs["damaged"] = damaged
    return found


def _row(run: Path) -> dict[str, Any]:
    return make_row(run, read_config(run), read_provenance(run), read_metrics(run))


def make_row(
    run: Path, config: Mapping[str, Any], provenance: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """The row of a run from the contents of its files. Raises UserError where its cost is damaged."""
    metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    row = flatten(config) | flatten({"metrics": metrics, "digests": provenance["digests"]})
    cost = provenance.get("cost", {})  # runs of earlier versions have none
    if not isinstance(cost, dict) or not all(is_number(cost.get(name, 1)) for name in (*COSTS, TOGETHER)):
        raise UserError(f"{run / PROVENANCE}: damaged: it does not tell what the run cost")
    row |= {f"metrics.cost.{name}": cost[name] for name in COSTS if name in cost}
    row["recipe"] = config.get("recipe", "published") if config.get("train") else None
    row |= {DOUBTFUL: bool(provenance.get("selection")), SHARED: cost.get(TOGETHER, 1) > 1}
    return row | {"dataset": provenance["dataset"], "run": str(run)}
