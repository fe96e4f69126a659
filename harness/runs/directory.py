"""The run directory: all that a run leaves behind.

    <method>_<shots>_seed<seed>_<12 hex digits>/
        config.yaml           the resolved config
        provenance.json       versions, git commit, digests, seeds, hardware, times
        steps.jsonl           learning rate and loss by step, validation accuracy by epoch
        predictions.parquet   id, class, logits and probabilities of every test sample: the record from which metrics derive
        metrics.json          see harness/evaluation/metrics.py
        intervals.json        of the metrics: ends and method, see harness/evaluation/statistics/intervals.py
        prompts.safetensors   the learned tensors
        tuning.json           of a tuned recipe: the candidates on validation, and the one chosen
        logs/rank-0.log ...   messages of each process
        checkpoints/          see harness/training/checkpoint.py; until the run is finished
        candidates/           of a tuned recipe, each with its own checkpoints; until the run is finished
        tracking/             files of trackers, where any were asked for
        files.json            SHA-256 of each file above (not of those in folders): written last, checked when a run is read

While a run works, its directory ends in ".partial"; the name without it means that the run is whole. One that was interrupted
goes on in its partial directory from its newest checkpoint; one that failed leaves failed.json there too, with the error.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import (
    atomic_path,
    digest_file,
    is_locked,
    parse_json,
    read_json,
    read_whole,
    read_yaml,
    write_json,
    write_text,
)
from vipbench.harness.system.plain_values import MOST_NUMBER, is_number

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vipbench.harness.config.schema import Config
    from vipbench.harness.evaluation.predict import Predictions

CONFIG, PROVENANCE, STEPS = "config.yaml", "provenance.json", "steps.jsonl"
PREDICTIONS, METRICS, PROMPTS = "predictions.parquet", "metrics.json", "prompts.safetensors"
PARTIAL, FAILED, CHECKPOINTS, LOGS = ".partial", "failed.json", "checkpoints", "logs"
TUNING, CANDIDATES = "tuning.json", "candidates"
INTERVALS = "intervals.json"
FILES = "files.json"
AGAIN = "remove the run, or run it again with --force"
ALWAYS = (CONFIG, PROVENANCE, PREDICTIONS, METRICS)  # files that every finished run has
DIGESTS = {"dataset": str, "backbone": str, "symptoms": str | None}  # in provenance.json
NOT_FRACTIONS = ("samples", "mae")  # among the metrics
MOST_LOG_BYTES = 1 << 30  # of a log of steps
SECONDS_TO_LOCK = 1.0  # is_running holds the lock for a moment

log = logging.getLogger(__name__)


class RunDirectory:
    """A run directory being written (its path ends in ".partial")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[
            Callable[[Mapping[str, Any]], None]
        ] = []  # called with each row of steps, and with the metrics

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    def candidate(self, number: int) -> "RunDirectory":
        """The directory of a candidate of a tuned recipe, counted from 1; it goes when the run is finished."""
        path = self.path / CANDIDATES / str(number)
        path.mkdir(parents=True, exist_ok=True)
        return RunDirectory(path)

    def adopt(self, candidate: "RunDirectory") -> None:
        """Take over the log of steps and the checkpoints of a candidate, as if the run had trained that alone."""
        files = [path for path in candidate.checkpoints.glob("*") if path.is_file()]
        self.checkpoints.mkdir(exist_ok=True)
        for path in [*sorted(files, key=lambda path: path.suffix == ".json"), candidate.path / STEPS]:
            shutil.copy(path, self.path / path.relative_to(candidate.path))
        for line in read_whole(self.path / STEPS, MOST_LOG_BYTES).splitlines():
            self._notify(parse_json(line))

    def write_config(self, config: "Config") -> None:
        write_text(self.path / CONFIG, config.to_yaml())

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append one line to the log of steps."""
        with (self.path / STEPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._notify(row)

    def rewind(self, step: int) -> None:
        """Cut the log of steps after a step, from which the run goes on; lines that are not whole, or damaged, go too."""
        path = self.path / STEPS
        if path.is_file():
            lines = read_whole(path, MOST_LOG_BYTES).splitlines(keepends=True)
            steps = [_step_of(line) for line in lines]
            damaged = sum(found is None for found in steps)
            if damaged:
                log.warning(
                    "%s: %d lines are damaged or were not written to their end; they are removed", path, damaged
                )
            kept = (line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step)
            with atomic_path(path) as temporary:
                temporary.write_bytes(b"".join(kept))

    def flush_steps(self) -> None:
        """Flush the log of steps to the disk, so that it outlives a crash of the machine."""
        if (self.path / STEPS).is_file():
            with (self.path / STEPS).open("rb") as file:
                os.fsync(file.fileno())

    def write_prompts(self, tensors: "Mapping[str, Tensor]") -> None:
        from safetensors.torch import save

        from vipbench.harness.system.devices import to_host

        with atomic_path(self.path / PROMPTS) as temporary:  # save_file hides which error of the system it met
            temporary.write_bytes(save({name: to_host(tensor).contiguous() for name, tensor in tensors.items()}))

    def write_evaluation(self, predictions: "Predictions", classes: list[str], provenance: Mapping[str, Any]) -> None:
        """Write predictions, the metrics and intervals that derive from them, and provenance."""
        from vipbench.harness.evaluation.statistics.intervals import intervals, to_json

        with atomic_path(self.path / PREDICTIONS) as temporary:
            predictions.to_frame(classes).to_parquet(temporary, index=False)
        ordinal = bool(provenance.get("ordinal"))
        metrics = predictions.metrics(classes, ordinal)
        found = intervals(predictions.predicted(classes, ordinal), predictions.clusters)
        write_json(self.path / INTERVALS, to_json(found))
        write_json(self.path / METRICS, metrics)
        write_json(self.path / PROVENANCE, dict(provenance))
        self._notify({f"test/{name}": value for name, value in metrics.items()})

    def _notify(self, row: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener(row)


@contextmanager
def new_run(final: Path, restart: bool = False) -> Iterator[RunDirectory]:
    """Open the directory `final`.partial, locked against other processes; it becomes `final` when the block succeeds.

    One that holds a checkpoint is kept, so that the run can go on, unless it is to start `restart`; any other one is emptied. An
    existing `final` is replaced. When the block fails the partial directory stays, with the reason.

    Raises:
        UserError: another process is working on this run, or `final` is a file.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists() and not final.is_dir():
        raise UserError(f"{final}: there is a file where this run's directory should be; move it away")
    try:
        lock = _lock(final).acquire(timeout=SECONDS_TO_LOCK)
    except Timeout as error:
        raise UserError(f"{final}: another process is working on this run; wait for it, or stop it first") from error
    partial = final.with_name(final.name + PARTIAL)
    with lock:
        for replaced in final.parent.glob(f".{final.name}.*.old"):  # by a process that died as it removed it
            shutil.rmtree(replaced)
        _prepare(partial, restart)
        try:
            yield RunDirectory(partial)
            write_digests(partial)
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
        for folder in (CHECKPOINTS, CANDIDATES):
            shutil.rmtree(final / folder, ignore_errors=True)


def _step_of(line: bytes) -> int | None:
    """The step of a line in the log of steps; None where the line is damaged."""
    try:
        step = parse_json(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _prepare(partial: Path, restart: bool) -> None:
    """Make a partial directory in which a run starts, or goes on."""
    if restart or not any(any((partial / folder).rglob("*.json")) for folder in (CHECKPOINTS, CANDIDATES)):
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
    """Check that a run directory is that of a finished run."""
    return not path.name.endswith(PARTIAL) and (path / METRICS).is_file()


def failure(path: Path) -> str | None:
    """The reason that a run recorded as it failed; None where there is none."""
    record = path.with_name(path.name + PARTIAL) / FAILED
    if not record.is_file():
        return None
    try:
        return str(read_json(record)["error"])
    except (UserError, KeyError, TypeError):
        return f"{record} is damaged, so that why it failed is not known; run it again"


def is_running(path: Path) -> bool:
    """Check for a process that works on a run: on this machine, or on any where the file system shares locks (NFS 4 does)."""
    return is_locked(_lock_file(path))


def log_file(run: Path, rank: int) -> Path:
    """A rank's log in a run directory."""
    return run / LOGS / f"rank-{rank}.log"


def _lock(run: Path) -> FileLock:
    return FileLock(_lock_file(run))


def _lock_file(run: Path) -> Path:
    return run.parent / f".{run.name}.lock"


def write_digests(run: Path) -> None:
    """Write the digest of every file of a run directory; folders (logs, trackers, evaluations) are no part of the result."""
    files = sorted(path for path in run.iterdir() if path.is_file() and path.name != FILES)
    write_json(run / FILES, {path.name: digest_file(path) for path in files})


def check_run(run: Path) -> None:
    """Check that a finished run is as it was written.

    Runs of earlier versions have no digests; there the accuracy in metrics.json must be that of the predictions.

    Raises:
        UserError: not a finished run, or a file of it is missing or damaged (names it).
    """
    if not is_finished(run):
        raise UserError(f"{run}: no finished run; a run directory holds {METRICS} and does not end in {PARTIAL}")
    if damage := find_damage(run):
        raise UserError(f"{damage}; {AGAIN}")
    if not (run / FILES).is_file():
        _check_by_content(run)


def find_damage(run: Path, most_bytes: int | None = None) -> str | None:
    """The first file of a finished run that is missing or not as it was written, in one line; None where there is none.

    Args:
        most_bytes: of the files whose content is compared; larger ones only have to be there. None: of all.
    """
    has_digests = (run / FILES).is_file()  # a run of an earlier version has none
    try:
        digests = read_digests(run) if has_digests else {}
    except UserError as error:
        return str(error)
    for name in digests or ALWAYS:
        if not (run / name).is_file():
            return f"{run / name}: missing"
    for name, digest in digests.items():
        small = most_bytes is None or (run / name).stat().st_size <= most_bytes
        if small and digest_file(run / name) != digest:
            return f"{run / name}: damaged: it is not what the run wrote ({FILES})"
    return None


def read_digests(run: Path) -> dict[str, Any]:
    """SHA-256 of a run's files by name."""
    digests = read_json(run / FILES)
    if not isinstance(digests, dict) or not set(ALWAYS) <= set(digests) or any(Path(n).name != n for n in digests):
        raise UserError(f"{run / FILES}: damaged: it is no list of a run's files")
    return digests


def read_provenance(run: Path, content: Any = None) -> dict[str, Any]:
    """The provenance of a run, `content` if that was read. Raises UserError where it does not name dataset and digests."""
    provenance = content or read_json(run / PROVENANCE)
    if not isinstance(provenance, dict) or not isinstance(digests := provenance.get("digests"), dict):
        raise UserError(f"{run / PROVENANCE}: damaged: it has no digests")
    if not all(isinstance(digests.get(name), kind) for name, kind in DIGESTS.items()):
        raise UserError(f"{run / PROVENANCE}: damaged: it needs the digests of {', '.join(DIGESTS)}")
    if not isinstance(provenance.get("dataset"), str):
        raise UserError(f"{run / PROVENANCE}: damaged: it does not name the dataset")
    return provenance


def read_classes(run: Path) -> list[str]:
    """The classes that a run learned, in the order of its predictions. Raises UserError where its provenance lacks them."""
    classes = read_provenance(run).get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{run / PROVENANCE}: damaged: it does not name the classes")
    return classes


def read_metrics(run: Path, content: Any = None) -> dict[str, Any]:
    """The metrics of a run, `content` if that was read. Raises UserError where one is no fraction, or no number."""
    metrics = content or read_json(run / METRICS)
    if not isinstance(metrics, dict):
        raise UserError(f"{run / METRICS}: damaged: it holds no metrics")
    for name, value in metrics.items():
        kind, most = ("number", MOST_NUMBER) if name in NOT_FRACTIONS else ("fraction", 1)
        if not (is_number(value, most) or value is None or isinstance(value, dict)):
            raise UserError(f"{run / METRICS}: damaged: {name} is {shortened(value, 40)}, where a {kind} is expected")
    return metrics


def read_config(run: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of a run, `content` if that was read. Raises UserError where it names no method, or has no data."""
    config = content or read_yaml(run / CONFIG)
    method, data = config.get("method"), config.get("data")
    if not (isinstance(method, dict) and isinstance(method.get("name"), str) and isinstance(data, dict)):
        raise UserError(f"{run / CONFIG}: damaged: it is not the config of a run")
    return config


def _check_by_content(run: Path) -> None:
    """Check a run without digests: files of the right form, and an accuracy that is that of the predictions."""
    read_config(run), read_provenance(run)
    metrics = read_metrics(run)
    correct = _correct(run / PREDICTIONS)
    if metrics.get("samples") != len(correct):
        raise UserError(f"{run / METRICS}: damaged: it is not of the {len(correct)} samples in {PREDICTIONS}")
    accuracy = metrics.get("accuracy")
    if not isinstance(accuracy, int | float) or abs(float(correct.mean()) - accuracy) > 1e-6:
        raise UserError(f"{run / METRICS}: damaged: accuracy is {accuracy}, but {correct.mean():.4f} in {PREDICTIONS}")


def _correct(path: Path) -> "np.ndarray":
    """Compare the predictions of a file with its labels: [N] bool, N >= 1."""
    import numpy as np
    import pandas as pd
    from pyarrow import ArrowException

    try:
        frame = pd.read_parquet(path, columns=["label", "logits"])
        correct = np.stack(frame["logits"].to_list()).argmax(axis=1) == frame["label"].to_numpy()
    except (ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: none, or of unequal length
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error
    return correct


def read_prompts(run: Path) -> "dict[str, Tensor]":
    """The learned tensors of a finished run, by name (empty for a method that does not train).

    Raises:
        UserError: not a finished run, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_run(run)
    path = run / PROMPTS
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}; {AGAIN}") from error
