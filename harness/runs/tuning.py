"""Tuned recipes: train each candidate of a grid, and keep the one that is best on validation; only that one is tested.

A candidate that was trained is not trained again when the run goes on. All ranks compute, and rank 0 writes.
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from vipbench.harness.config.schema import Config
from vipbench.harness.config.validation import parse
from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.leaks import REPORT
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.remote import join, read_bytes
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import Diverged, UserError
from vipbench.harness.runs.directory import TUNING, RunDirectory
from vipbench.harness.runs.inputs import Inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.provenance import Provenance
from vipbench.harness.system.files import read_json, write_json
from vipbench.harness.training.cost import Cost

log = logging.getLogger(__name__)

RULE = "highest validation accuracy of the kept epoch; of equal ones the lowest validation loss, then the first of the grid"
RESULT = "result.json"  # in a candidate's directory, once it is trained
OTHERWISE = "use recipe=published or recipe=fixed (the test set is never used to choose)"


@dataclass(frozen=True)
class Candidate:
    """A point of the grid and its result on validation.

    Attributes:
        settings: the entries of `train` that the grid sets.
        accuracy, loss: on the validation samples, of the kept epoch; None where the training failed.
        error: the reason why it failed.
    """

    settings: Mapping[str, Any]
    epoch: int | None = None
    accuracy: float | None = None
    loss: float | None = None
    error: str | None = None


class _Trained(BaseModel):
    """A candidate with what training it cost, which is no part of the result; the content of a `RESULT` file."""

    candidate: Candidate
    cost: Cost


def tuned_job(config: Config, inputs: Inputs, topology: Topology, directory: RunDirectory | None) -> Job:
    """Train the candidates of a tuned recipe; returns the job of the chosen one, whose training goes on from its end.

    Raises:
        UserError: no validation samples to choose with, validation samples that are in train or test too, DeepSpeed, or every
            candidate failed.
    """
    check_validation(inputs.dataset, config.data.path)
    if topology.zero_stage:
        raise UserError(
            "recipe: tuned trains several times with one backbone, which DeepSpeed does not take; use --multi_gpu"
        )
    began = Provenance(inputs.dataset, inputs.digests, topology)
    configs, grid = config.candidates(), config.grid
    assert grid
    trained: list[_Trained] = []
    for number, one in enumerate(configs, start=1):
        assert one.train
        settings = {name: getattr(one.train, name) for name in grid}
        log.info("candidate %d of %d: %s", number, len(configs), _shown(settings))
        own = directory.candidate(number) if directory else None
        found = _read(own, topology) or _train(one, settings, inputs, topology, own)
        trained.append(found)
        log.info("candidate %d of %d: %s", number, len(configs), found.candidate.error or _score(found.candidate))
    candidates = [found.candidate for found in trained]
    chosen = choose(candidates)
    record = {"rule": RULE, "grid": grid, "candidates": [asdict(one) for one in candidates], "chosen": chosen}
    log.info("chosen on validation: %s", _shown(candidates[chosen].settings))
    if directory:
        directory.adopt(directory.candidate(chosen + 1))
        write_json(directory.path / TUNING, record)
    job = Job(configs[chosen], inputs, topology, directory)
    job.provenance.started, job.provenance.clock = began.started, began.clock
    job.provenance.add(tuning={"chosen": candidates[chosen].settings, "candidates": len(candidates), "rule": RULE})
    for place, found in enumerate(trained):
        if place != chosen:  # the chosen one's cost is in its checkpoint
            job.meter.resume(found.cost)
    return job


def choose(candidates: Sequence[Candidate]) -> int:
    """The place of the best candidate, by `RULE`. Raises UserError where all of them failed."""
    scores = {
        place: (one.accuracy, -one.loss)
        for place, one in enumerate(candidates)
        if one.accuracy is not None and one.loss is not None
    }
    if not scores:
        raise UserError(f"recipe: tuned: every candidate failed; the first one: {candidates[0].error}")
    return max(scores, key=lambda place: scores[place])  # the first of equal ones


def _train(
    config: Config, settings: Mapping[str, Any], inputs: Inputs, topology: Topology, directory: RunDirectory | None
) -> _Trained:
    """Train a candidate, from its newest checkpoint on, score it on validation, and record the result."""
    job = Job(config, inputs, topology, directory)
    assert job.training
    try:
        best = job.train()
        assert best
        job.training.check_finite()
        predictions = job.validate()
        candidate = Candidate(settings, best.epoch, predictions.accuracy(), predictions.loss())
    except Diverged as error:
        candidate = Candidate(settings, error=str(error))
    trained = _Trained(candidate=candidate, cost=Cost(**job.meter.state()))
    topology.accelerator.free_memory()  # it keeps every model and optimizer that it prepared
    if directory:
        write_json(directory.path / RESULT, trained.model_dump(mode="json"))
    return trained


def _read(directory: RunDirectory | None, topology: Topology) -> _Trained | None:
    """The recorded result of a candidate; None where it is still to be trained. All ranks call it together.

    Raises:
        UserError: the file is damaged.
    """
    path = directory.path / RESULT if directory else None
    content = topology.broadcast(read_json(path) if path and path.is_file() else None)
    return None if content is None else parse(_Trained, content, f"{path or RESULT}: damaged")


def check_validation(dataset: Dataset, path: str) -> None:
    """Check that a dataset has validation samples to choose with, none of which is in another split.

    Raises:
        UserError: it has none, or one of them, or a patient of them, is in train or test, by the record of `vipbench prepare`.
    """
    if not dataset.has("val"):
        raise UserError(
            f"recipe: tuned needs a validation split, and {path} has none; prepare the data with one, or {OTHERWISE}"
        )
    leaks = dataset.info.leaks
    if leaks is None or leaks.policy != Leaks.keep or not (leaks.across or leaks.patients):
        return
    splits: dict[str, set[str]] = {}
    report = join(path, REPORT)
    try:
        for row in csv.DictReader(io.StringIO(read_bytes(report).decode("utf-8"))):
            splits.setdefault(row["finding"], set()).add(row["split"])
    except (ValueError, KeyError, csv.Error):
        splits = {}
    if not splits:
        raise UserError(f"{report}: damaged: it has no findings by split; prepare the data again")
    if count := sum("val" in found and len(found) > 1 for found in splits.values()):
        raise UserError(
            f"recipe: tuned: {count} groups of identical images or patients are in val and in another split of {path} "
            f"({REPORT}); prepare it with --leaks drop-train, or {OTHERWISE}"
        )


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _score(candidate: Candidate) -> str:
    return f"validation accuracy {candidate.accuracy:.4f}, loss {candidate.loss:.4f}, epoch {candidate.epoch}"
