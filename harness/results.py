"""The run directory: what a run leaves behind, and many run directories as one table of rows.

    <method>_<shots>_seed<seed>_<12 hex digits>/
        config.yaml           the resolved config
        provenance.json       versions, git commit, digests, seeds, hardware, times
        steps.jsonl           learning rate and loss by step, validation accuracy by epoch
        predictions.parquet   id, label, logits of every test sample: the record from which metrics derive
        metrics.json          see harness/metrics.py
        prompts.safetensors   what was learned
        logs/rank-0.log ...   what each process had to say
        checkpoints/          see harness/checkpoint.py; until the run is finished
        tracking/             what trackers wrote, where any were asked for

While a run works, its directory ends in ".partial"; the name without it means that the run is whole. One that was interrupted
goes on in its partial directory from its newest checkpoint; one that failed leaves failed.json there too, with the error.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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
PARTIAL, FAILED, CHECKPOINTS = ".partial", "failed.json", "checkpoints"
SECONDS_TO_LOCK = 1.0  # is_running holds the lock for a moment

log = logging.getLogger(__name__)


class RunDirectory:
    """A run directory being written (its path ends in ".partial")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # are told each row of steps, and the metrics

    def write_config(self, config: "Config") -> None:
        write_text(self.path / CONFIG, config.to_yaml())

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append one line to the log of steps."""
        with (self.path / STEPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._tell(row)

    def rewind(self, step: int) -> None:
        """Cut the log of steps after a step, from which the run goes on; a line that was not written to its end goes too."""
        path = self.path / STEPS
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(
                path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
            )

    def flush_steps(self) -> None:
        """Have the log of steps on the disk, where a crash of the machine does not reach it."""
        if (self.path / STEPS).is_file():
            with (self.path / STEPS).open("rb") as file:
                os.fsync(file.fileno())

    def write_prompts(self, tensors: "Mapping[str, Tensor]") -> None:
        from safetensors.torch import save

        with atomic_path(self.path / PROMPTS) as temporary:  # save_file would not say which error of the system it met
            temporary.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))

    def write_evaluation(self, predictions: "Predictions", classes: list[str], provenance: Mapping[str, Any]) -> None:
        """Write predictions, the metrics that derive from them, and provenance."""
        with atomic_path(self.path / PREDICTIONS) as temporary:
            predictions.to_frame().to_parquet(temporary, index=False)
        metrics = predictions.metrics(classes)
        write_json(self.path / METRICS, metrics)
        write_json(self.path / PROVENANCE, dict(provenance))
        self._tell({f"test/{name}": value for name, value in metrics.items()})

    def _tell(self, row: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener(row)


@contextmanager
def new_run(final: Path, anew: bool = False) -> Iterator[RunDirectory]:
    """The directory `final`.partial, locked against other processes; it becomes `final` when the block succeeds.

    One that holds a checkpoint is kept, so that the run can go on, unless it is to start `anew`; any other one is emptied. An
    existing `final` is replaced. When the block fails the partial directory stays, with the reason.

    Raises:
        UserError: another process is working on this run.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(final).acquire(timeout=SECONDS_TO_LOCK)
    except Timeout as error:
        raise UserError(f"{final}: another process is working on this run; wait for it, or stop it first") from error
    partial = final.with_name(final.name + PARTIAL)
    with lock:
        _prepare(partial, anew)
        try:
            yield RunDirectory(partial)
        except Exception as error:
            _record_failure(partial, error)
            raise
        if final.exists():
            old = final.with_name(f".{final.name}.{os.getpid()}.old")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
        shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)


def _prepare(partial: Path, anew: bool) -> None:
    """Make a partial directory in which a run starts, or goes on."""
    if anew or not any((partial / CHECKPOINTS).glob("*.json")):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    (partial / FAILED).unlink(missing_ok=True)
    for interrupted in partial.glob(".*.tmp"):  # files that were being written
        interrupted.unlink()


def _record_failure(partial: Path, error: Exception) -> None:
    try:
        write_json(partial / FAILED, {"error": " ".join(f"{error}".split()) or type(error).__name__})
    except OSError as trouble:  # the disk may be what failed
        log.error("%s: why the run failed cannot be recorded there: %s", partial, trouble.strerror)


def is_finished(path: Path) -> bool:
    """Whether a run directory is whole."""
    return not path.name.endswith(PARTIAL) and (path / METRICS).is_file()


def failure(path: Path) -> str | None:
    """Why a run failed, in its own words; None where it did not say."""
    record = path.with_name(path.name + PARTIAL) / FAILED
    if not record.is_file():
        return None
    try:
        return str(read_json(record)["error"])
    except (UserError, KeyError, TypeError):
        return f"{record} is damaged, so that why it failed is not known; run it again"


def is_running(path: Path) -> bool:
    """Whether a process on this machine is working on a run."""
    try:
        with _lock_file(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that those who ask do not see each other
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock(run: Path) -> FileLock:
    return FileLock(_lock_file(run))


def _lock_file(run: Path) -> Path:
    return run.parent / f".{run.name}.lock"


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
