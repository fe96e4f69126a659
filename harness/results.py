"""The run directory: what a run leaves behind, and many run directories as one table of rows.

    <method>_<shots>_seed<seed>_<12 hex digits>/
        config.yaml           the resolved config
        provenance.json       versions, git commit, digests, seeds, hardware, times
        steps.jsonl           learning rate and loss by step, validation accuracy by epoch
        predictions.parquet   id, label, logits of every test sample: the record from which metrics derive
        metrics.json          see harness/metrics.py
        prompts.safetensors   what was learned

While a run works, its directory ends in ".partial"; the name without it means that the run is whole. A run that failed leaves
failed.json there, with the error.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from harness.errors import UserError
from harness.files import atomic_path, read_json, read_yaml, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from harness.config import Config
    from harness.evaluate import Predictions

CONFIG, PROVENANCE, STEPS = "config.yaml", "provenance.json", "steps.jsonl"
PREDICTIONS, METRICS, PROMPTS = "predictions.parquet", "metrics.json", "prompts.safetensors"
PARTIAL, FAILED = ".partial", "failed.json"


class RunDirectory:
    """A run directory being written (its path ends in ".partial")."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_config(self, config: "Config") -> None:
        write_text(self.path / CONFIG, config.to_yaml())

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append one line to the log of steps."""
        with (self.path / STEPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_prompts(self, tensors: "Mapping[str, Tensor]") -> None:
        from safetensors.torch import save_file

        with atomic_path(self.path / PROMPTS) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def write_evaluation(self, predictions: "Predictions", classes: list[str], provenance: Mapping[str, Any]) -> None:
        """Write predictions, the metrics that derive from them, and provenance."""
        with atomic_path(self.path / PREDICTIONS) as temporary:
            predictions.to_frame().to_parquet(temporary, index=False)
        write_json(self.path / METRICS, predictions.metrics(classes))
        write_json(self.path / PROVENANCE, dict(provenance))


@contextmanager
def new_run(final: Path) -> Iterator[RunDirectory]:
    """A fresh directory `final`.partial, locked against other processes; it becomes `final` when the block succeeds.

    An existing `final` is replaced. When the block fails the partial directory stays for inspection.

    Raises:
        UserError: another process is working on this run.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(final).acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{final}: another process is working on this run; wait for it, or stop it first") from error
    partial = final.with_name(final.name + PARTIAL)
    with lock:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield RunDirectory(partial)
        except Exception as error:
            write_json(partial / FAILED, {"error": " ".join(f"{error}".split()) or type(error).__name__})
            raise
        if final.exists():
            old = final.with_name(f".{final.name}.{os.getpid()}.old")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)


def is_finished(path: Path) -> bool:
    """Whether a run directory is whole."""
    return not path.name.endswith(PARTIAL) and (path / METRICS).is_file()


def failure(path: Path) -> str | None:
    """Why a run failed, in its own words; None where it did not say."""
    record = path.with_name(path.name + PARTIAL) / FAILED
    return str(read_json(record)["error"]) if record.is_file() else None


def is_running(path: Path) -> bool:
    """Whether a process on this machine is working on a run."""
    if not path.with_name(path.name + PARTIAL).is_dir():
        return False
    try:
        with _lock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True


def _lock(run: Path) -> FileLock:
    return FileLock(run.parent / f".{run.name}.lock")


def read_prompts(run: Path) -> "dict[str, Tensor]":
    """The learned tensors of a finished run, by name (empty for a method that does not train).

    Raises:
        UserError: not a finished run.
    """
    from safetensors.torch import load_file

    if not is_finished(run):
        raise UserError(f"{run}: no finished run; a run directory holds {METRICS} and does not end in {PARTIAL}")
    path = run / PROMPTS
    return load_file(path) if path.is_file() else {}


def read_runs(directory: Path) -> "pd.DataFrame":
    """One row per finished run directly under a directory, in the order of their names.

    Columns: every scalar of the resolved config under its dotted name ("seed", "data.shots", "method.name", ...), every
    overall metric as "metrics.accuracy" and so on, "digests.dataset", "digests.backbone", "digests.symptoms", "dataset" (its
    name) and "run" (the path).
    """
    import pandas as pd

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory of runs")
    rows = []
    for path in sorted(directory.iterdir()):
        if path.is_dir() and is_finished(path):
            config = read_yaml(path / CONFIG)
            metrics = {name: value for name, value in read_json(path / METRICS).items() if not isinstance(value, dict)}
            provenance = read_json(path / PROVENANCE)
            row = flatten(config) | flatten({"metrics": metrics, "digests": provenance["digests"]})
            rows.append(row | {"dataset": provenance["dataset"], "run": str(path)})
    return pd.DataFrame(rows)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists become tuples, so that rows can be compared and grouped."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat
