"""The predictions of finished runs and of their evaluations, as the statistics take them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pyarrow import ArrowException
from pyarrow.parquet import read_schema

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.bootstrap import cluster_codes
from vipbench.harness.runs.directory import PREDICTIONS, read_classes

PATIENT = "patient"  # a column of predictions, where the dataset has it


class PredictedSamples(NamedTuple):
    """Predictions of N samples, their ids [N] str, and the cluster (patient) of each [N] int, None where patients are unknown."""

    ids: np.ndarray
    predicted: Predicted
    clusters: np.ndarray | None


def read_predicted(folder: Path) -> PredictedSamples:
    """Read the predictions in a run directory, or in that of an evaluation.

    Raises:
        UserError: a file is missing or damaged.
    """
    path, classes = folder / PREDICTIONS, read_classes(folder)
    try:
        columns = [name for name in ("id", "label", "logits", PATIENT) if name in read_schema(path).names]
        stored = pd.read_parquet(path, columns=columns)
        logits = np.stack(stored["logits"].to_list())
        found = Predicted(stored["label"].to_numpy(np.int64), logits, classes)
        if logits.shape != (len(stored), len(classes)) or not np.isin(found.labels, range(len(classes))).all():
            raise ValueError(f"logits and labels are not of the {len(classes)} classes")
        clusters = cluster_codes(stored[PATIENT].to_list()) if PATIENT in stored else None
        return PredictedSamples(stored["id"].to_numpy(), found, clusters)
    except (ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error
