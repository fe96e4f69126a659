"""Run directories as runs leave them, from made predictions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.runs.directory import write_digests

CLASSES = ("nevus", "melanoma")


def write_run(
    folder: Path,
    method: str,
    shots: int | str,
    seed: int,
    right: Sequence[bool],
    *,
    data: str = "data",
    classes: Sequence[str] = CLASSES,
    digests: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a finished run whose predictions are `right` or not, of samples whose classes take turns.

    Args:
        settings: entries of the config's `train`, or of the method as `method__name`.
    """
    options = {name.removeprefix("method__"): value for name, value in settings.items() if name.startswith("method__")}
    train = {name: value for name, value in settings.items() if not name.startswith("method__")}
    name = "_".join([method, f"{shots}shot", f"seed{seed}", data, *map(str, settings.values())])
    path = folder / name
    path.mkdir(parents=True)
    config = {
        "seed": seed,
        "data": {"path": data, "shots": shots, "split_seed": seed},
        "backbone": {"name": "ViT-B-16"},
        "symptoms": None,
        "method": {"name": method, **options},
        "train": {"lr": 0.1, "augmentation_seed": seed, **train} if shots != 0 else None,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_results(path, right, data, classes, {"dataset": f"digest of {data}", **(digests or {})}, provenance or {})
    write_digests(path)
    return path


def write_results(
    path: Path,
    right: Sequence[bool],
    data: str,
    classes: Sequence[str],
    digests: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write predictions, metrics and provenance, of a run or an evaluation."""
    path.mkdir(parents=True, exist_ok=True)
    labels = np.arange(len(right)) % len(classes)
    predicted = np.where(right, labels, (labels + 1) % len(classes))
    logits = (
        np.eye(len(classes), dtype=np.float32)[predicted] * np.linspace(1, 2, len(right), dtype=np.float32)[:, None]
    )
    predictions = Predictions(np.array([f"{data} {n:04d}" for n in range(len(right))], dtype=object), labels, logits)
    predictions.to_frame(classes).to_parquet(path / "predictions.parquet", index=False)
    (path / "metrics.json").write_text(json.dumps(predictions.metrics(list(classes))))
    described = {"dataset": data, "classes": list(classes), **provenance}
    described["digests"] = {"backbone": "b", "symptoms": None, **digests}
    (path / "provenance.json").write_text(json.dumps(described))


def share(right: int, of: int = 100) -> list[bool]:
    """Of so many samples, which are right: the first ones."""
    return [place < right for place in range(of)]
