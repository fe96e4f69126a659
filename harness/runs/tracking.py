"""Trackers that watch a run: TensorBoard, Weights & Biases and MLflow, through accelerate. Nothing is tracked unless asked.

python harness/run.py CONFIG.yaml run.tracking=[tensorboard]      # then: tensorboard --logdir runs

W&B and MLflow read their destination from their own variables (WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI, ...).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
    get_available_trackers,
)

from vipbench.harness.errors import UserError

FOLDER = "tracking"  # in the run directory
ONE_RUN_PER_PROCESS = ("wandb", "mlflow")  # their clients keep the current run in the process


@contextmanager
def tracking(
    names: Sequence[str], project: str, run: str, folder: Path, settings: Mapping[str, Any]
) -> Iterator["Trackers"]:
    """Start the trackers of one run, and finish them at the end.

    Args:
        names: of "tensorboard", "wandb" and "mlflow".
        project: of W&B, and MLflow's experiment. run: the run's name there.
        folder: for the files of trackers that write some.
        settings: the run's config, by dotted keys.

    Raises:
        UserError: a tracker is not installed.
    """
    available = [tracker.value for tracker in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        raise UserError(f"run.tracking: {missing[0]} is not installed here; pip install {missing[0]}, or leave it out")
    trackers = Trackers([_tracker(name, project, run, folder) for name in names], settings)
    try:
        yield trackers
    finally:
        trackers.finish()


class Trackers:
    """Pass the settings and numbers of a run on to several trackers."""

    def __init__(self, trackers: Sequence[GeneralTracker], settings: Mapping[str, Any]) -> None:
        self.trackers, self.step = trackers, 0
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        for tracker in trackers:
            tracker.start()
            tracker.store_init_configuration(plain)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log numbers by name at the step that "step" gives, or at that of the row before."""
        self.step = row.get("step", self.step)
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(numbers, step=self.step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _tracker(name: str, project: str, run: str, folder: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("", logging_dir=folder)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "wandb":
        return WandBTracker(project, name=run, dir=str(folder))
    return MLflowTracker(project, run_name=run)
