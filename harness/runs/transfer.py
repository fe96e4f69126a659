"""Score the saved prompts of a run on another dataset: `vipbench evaluate RUN --data DIR`."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.identity import RESULT_VERSION, Digests
from harness.config.schema import Config
from harness.data.reader import Dataset
from harness.data.views import Loading
from harness.distributed.topology import Topology
from harness.errors import UserError
from harness.evaluation.predict import EvaluationSet, Predictions
from harness.features.source import Source
from harness.models.backbone import load_backbone
from harness.runs.directory import CONFIG, RunDirectory, read_classes, read_prompts, read_provenance
from harness.runs.inputs import build_method, make_task
from harness.runs.provenance import Provenance
from harness.runs.resolve import load_config
from harness.symptoms.sets import SymptomSet, load_sets, sets_digest
from harness.system.files import atomic_directory

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"  # in the run directory


def evaluate_run(
    run: Path,
    data: str | Path,
    split: str,
    symptoms: Path | None,
    device: str,
    on_error: str | None = None,
) -> Path:
    """Predict a split of a dataset with a run's prompts; returns the directory with predictions and metrics.

    The dataset's classes may come in another order, which is that of the predictions. They may be other classes only where the
    method learned nothing that belongs to a class, such as CoOp's shared context.

    Args:
        symptoms: another symptom set than the run's, which is then named in the directory and the record.
        on_error: what a damaged image does, "raise" or "skip"; None: what the run's config says.

    Raises:
        UserError: not a finished run, other classes than the prompts can serve, another backbone, or the run's own symptom set
            is no longer what it was.
    """
    prompts = read_prompts(run)
    config = load_config(run / CONFIG)
    trained, learned = read_provenance(run), read_classes(run)
    _warn_of_another_version(run, trained)
    dataset = Dataset(data)
    same = set(dataset.classes) == set(learned)
    classes = learned if same else dataset.classes
    symptom_sets = _symptoms(run, config, symptoms, trained["digests"])
    topology = Topology(device, config.precision)
    try:
        backbone = load_backbone(config.backbone, topology.device)
        if backbone.digest != trained["digests"]["backbone"]:
            raise UserError(
                f"{run}: the backbone {config.backbone.name!r} has other weights now than when the run was made"
            )
        method = build_method(config, make_task(classes, symptom_sets), backbone)
        if not same and method.per_class:
            raise UserError(f"{data}: {config.method.name} learned for {learned}; {dataset.classes} are other classes")
        method.load_learned(prompts)
        settings = config.data.model_copy(update={"on_error": on_error} if on_error else {})
        loading = Loading(config.run.eval_batch_size, config.run.workers, settings.on_error)
        source = Source(dataset.split(split), backbone, method.needs, topology, loading, split)
        predictions = _in_order(EvaluationSet(source, topology).predict(method), classes, dataset.classes)
        digests = Digests(dataset.info.digest, backbone.digest, sets_digest(symptom_sets))
        provenance = Provenance(dataset, digests, topology)
        provenance.add(run=run.name, split=split)
        if source.images.skipped:
            provenance.add(skipped={split: source.images.skipped})
        out = run / EVALUATIONS / _name(dataset.info.name, split, digests, trained["digests"])
        with atomic_directory(out, overwrite=True) as folder:
            RunDirectory(folder).write_evaluation(predictions, dataset.classes, provenance.describe())
    finally:
        topology.close()
    log.info("%s: %s", out, predictions.summary(dataset.classes))
    return out


def _symptoms(run: Path, config: Config, other: Path | None, trained: dict[str, Any]) -> list[SymptomSet]:
    """The sets that the run was trained with, or another one where it is named."""
    if not config.symptoms:
        if other:
            raise UserError(f"--symptoms: {config.method.name} reads no symptom set; leave it out")
        return []
    found = load_sets(other or config.symptoms)
    if sets_digest(found) != trained["symptoms"]:
        if other is None:
            named = config.symptoms if isinstance(config.symptoms, Path) else ", ".join(map(str, config.symptoms))
            raise UserError(
                f"{named}: holds other symptoms now than when {run.name} was trained; restore it, or name the set to "
                "evaluate with in --symptoms"
            )
        log.warning("%s: not the symptom set that the prompts were trained with", other)
    return found


def _warn_of_another_version(run: Path, trained: dict[str, Any]) -> None:
    version = trained.get("result_version")
    if version != RESULT_VERSION:
        log.warning("%s: made by result version %s of vipbench; this is %s", run, version, RESULT_VERSION)


def _name(dataset: str, split: str, digests: Digests, trained: dict[str, Any]) -> str:
    """The folder of an evaluation: readable words of the dataset and its digest, and that of another symptom set."""
    words = [re.sub(r"[^\w-]+", "-", word) for word in (dataset, split)]
    other = digests.symptoms if digests.symptoms != trained["symptoms"] else None
    return "_".join([*words, digests.dataset[:8], *([f"symptoms-{other[:8]}"] if other else [])])


def _in_order(predictions: Predictions, predicted: list[str], labelled: list[str]) -> Predictions:
    """Logits in the method's order of classes, put into the dataset's, in which its labels count."""
    columns = np.array([predicted.index(name) for name in labelled])
    return Predictions(predictions.ids, predictions.labels, np.ascontiguousarray(predictions.logits[:, columns]))
