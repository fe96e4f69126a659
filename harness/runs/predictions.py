"""Read what a run directory, or a folder of its evaluations, holds of predictions and of the intervals that derive from them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pyarrow import ArrowException

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.predict import COLUMNS, Predictions
from vipbench.harness.evaluation.statistics.intervals import Intervals, from_json, intervals
from vipbench.harness.runs.directory import INTERVALS, PREDICTIONS, read_classes, read_provenance
from vipbench.harness.system.files import read_json

DERIVED = ("class", "predicted", "probabilities")  # columns that follow from the others


def read_predictions(folder: Path, classes: int) -> Predictions:
    """Read the predictions of a folder, with the columns that samples may be grouped by, where it has them.

    Args:
        classes: their number.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / PREDICTIONS
    try:
        names = [name for name in pq.read_schema(path).names if name not in DERIVED]
        stored = pd.read_parquet(path, columns=names)
        ids, labels = stored["id"].to_numpy(), stored["label"].to_numpy()
        logits = np.stack(stored["logits"].to_list())
        if logits.shape[1:] != (classes,) or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"not of {classes} classes")
        groups = {
            str(name): [None if pd.isna(value) else str(value) for value in stored[name]]
            for name in stored.columns
            if name not in COLUMNS
        }
    except (ArrowException, OSError, ValueError, TypeError, IndexError, KeyError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error
    return Predictions(ids, labels, logits, groups)


def read_predicted(folder: Path) -> tuple[Predicted, Predictions]:
    """Read the predictions of a folder as statistics take them, and as they are stored (ids, patients, metadata)."""
    classes, ordinal = read_classes(folder), bool(read_provenance(folder).get("ordinal"))
    predictions = read_predictions(folder, len(classes))
    return predictions.predicted(classes, ordinal), predictions


def read_intervals(folder: Path) -> Intervals:
    """Read the intervals of a folder's metrics; compute them where an earlier version wrote none.

    Raises:
        UserError: a file is damaged.
    """
    path = folder / INTERVALS
    if not path.is_file():
        predicted, predictions = read_predicted(folder)
        return intervals(predicted, predictions.clusters)
    try:
        return from_json(read_json(path))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: it holds no intervals") from error
