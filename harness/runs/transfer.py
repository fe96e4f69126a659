"""Score the saved prompts of a run on another dataset: `vipbench evaluate RUN --data DIR`."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vipbench.harness.config.identity import Digests
from vipbench.harness.data.names import check_class_names, renamed
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.views import Loading
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.evaluation.predict import EvaluationSet, Predictions
from vipbench.harness.features.source import Source
from vipbench.harness.methods.registry import method_digest
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.directory import RunDirectory
from vipbench.harness.runs.provenance import Provenance
from vipbench.harness.symptoms.sets import sets_digest
from vipbench.harness.system.files import atomic_directory, digest_json

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"  # in the run directory


def evaluate_run(
    path: Path,
    data: str | Path,
    split: str,
    symptoms: Path | None,
    device: str,
    on_error: str | None = None,
    plugins: Sequence[Path] = (),
    changes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Predict a split of a dataset with a run's prompts; returns the directory with predictions and metrics.

    The dataset's classes may come in another order, which is that of the predictions. They may be other classes only where the
    method learned nothing that belongs to a class, such as CoOp's shared context.

    Args:
        symptoms: another symptom set than the run's, which is then named in the directory and the record.
        on_error: what a damaged image does, "raise" or "skip"; None: what the run's config says.
        plugins: where the files lie now that register the run's method, if not at the places in its config.
        changes: new names of the dataset's classes by their own ones, such as those that the run knows.

    Raises:
        UserError: not a finished run, other classes than the prompts can serve, another backbone, or the run's own symptom set
            or plugin is no longer what it was.
    """
    run = Run(path, plugins)
    config, trained = run.config, run.provenance["digests"]
    dataset = Dataset(data)
    labelled = renamed(dataset.classes, changes, str(data))
    check_class_names(labelled, "--rename")
    classes = run.classes if set(labelled) == set(run.classes) else labelled
    symptom_sets = run.symptom_sets(symptoms)
    topology = Topology(device, config.precision)
    try:
        method = run.restore(topology.device, classes, symptom_sets, data)
        settings = config.data.model_copy(update={"on_error": on_error} if on_error else {})
        loading = Loading(config.run.eval_batch_size, config.run.workers, settings.on_error)
        source = Source(dataset.split(split), method.backbone, method.needs, topology, loading, split)
        predictions = _reorder(EvaluationSet(source, topology).predict(method), classes, labelled)
        digests = Digests(
            dataset.info.digest,
            method.backbone.digest,
            sets_digest(symptom_sets),
            method_digest(config.method.name, config.method.files()),
        )
        provenance = Provenance(dataset, digests, topology)
        provenance.add(run=path.name, split=split)
        if changes:
            provenance.add(classes=labelled, renamed=dict(changes))
        if source.images.skipped:
            provenance.add(skipped={split: source.images.skipped})
        out = path / EVALUATIONS / _name(dataset.info.name, split, digests, trained, changes)
        with atomic_directory(out, overwrite=True) as folder:
            RunDirectory(folder).write_evaluation(predictions, labelled, provenance.describe())
    finally:
        topology.close()
    log.info("%s: %s", out, predictions.summary(labelled))
    return out


def _name(dataset: str, split: str, digests: Digests, trained: dict[str, Any], changes: Mapping[str, str]) -> str:
    """The folder name of an evaluation: dataset, split and digest, and the digests of another symptom set and of new names."""
    words = [re.sub(r"[^\w-]+", "-", word) for word in (dataset, split)]
    other = digests.symptoms if digests.symptoms != trained["symptoms"] else None
    names = [f"renamed-{digest_json(dict(changes))[:8]}"] if changes else []
    return "_".join([*words, digests.dataset[:8], *([f"symptoms-{other[:8]}"] if other else []), *names])


def _reorder(predictions: Predictions, predicted: list[str], labelled: list[str]) -> Predictions:
    """Put logits [N, C] from the method's order of classes into the dataset's, which its labels follow."""
    columns = np.array([predicted.index(name) for name in labelled])
    return replace(predictions, logits=np.ascontiguousarray(predictions.logits[:, columns]))
