"""Score the saved prompts of a run on another dataset: `vipbench evaluate RUN --data DIR`."""

import logging
from pathlib import Path

from harness.backbone import load_backbone
from harness.config import Config, Digests
from harness.data.reader import Dataset
from harness.errors import UserError
from harness.evaluate import EvaluationSet, Predictions
from harness.files import atomic_directory, read_json
from harness.method import Task
from harness.provenance import Provenance
from harness.results import CONFIG, PROVENANCE, RunDirectory, read_prompts
from harness.run import build_method
from harness.symptoms.sets import SymptomSet
from harness.topology import Topology
from harness.train import restore
from harness.views import Loading

log = logging.getLogger(__name__)


def evaluate_run(run: Path, data: Path, split: str, symptoms: Path | None, device: str) -> Path:
    """Predict a split of a dataset with a run's prompts; returns the directory with predictions and metrics.

    The dataset's classes may come in another order. They may be other classes only where the method learned nothing that
    belongs to a class, such as CoOp's shared context. The run's backbone must be the one that the prompts were trained on.

    Raises:
        UserError: not a finished run, other classes than the prompts can serve, or another backbone.
    """
    prompts = read_prompts(run)
    config = Config.load(run / CONFIG)
    trained = read_json(run / PROVENANCE)
    dataset, trained_classes = Dataset(data), trained["classes"]
    same = set(dataset.classes) == set(trained_classes)
    classes = trained_classes if same else dataset.classes
    symptom_set = SymptomSet.load(symptoms or config.symptoms) if config.symptoms else None
    topology = Topology(device, config.precision)
    try:
        backbone = load_backbone(config.backbone, topology.device)
        if backbone.digest != trained["digests"]["backbone"]:
            raise UserError(
                f"{run}: the backbone {config.backbone.name!r} has other weights now than when the run was made"
            )
        method = build_method(config, Task(classes, symptom_set.texts(classes) if symptom_set else None), backbone)
        if not same and method.per_class:
            raise UserError(
                f"{data}: {config.method.name} learned for {trained_classes}; {dataset.classes} are other classes"
            )
        restore(method, prompts)
        loading = Loading(config.run.eval_batch_size, config.run.workers)
        images = EvaluationSet(dataset.split(split), backbone, method.needs, topology, loading, split)
        predictions = _relabel(images.predict(method), dataset.classes, classes)
        digests = Digests(dataset.info.digest, backbone.digest, symptom_set.digest() if symptom_set else None)
        provenance = Provenance(dataset, digests, topology)
        out = run / "evaluations" / f"{dataset.info.name}_{split}_{dataset.info.digest[:8]}"
        with atomic_directory(out, overwrite=True) as folder:
            RunDirectory(folder).write_evaluation(predictions, classes, provenance.describe())
    finally:
        topology.close()
    log.info("%s: accuracy %.4f on %d images", out, predictions.accuracy(), len(predictions.ids))
    return out


def _relabel(predictions: Predictions, labelled: list[str], predicted: list[str]) -> Predictions:
    """Labels count in the dataset's order of classes, logits in the method's; make both the method's."""
    place = [predicted.index(name) for name in labelled]
    labels = predictions.labels.copy()
    labels[:] = [place[label] for label in predictions.labels]
    return Predictions(predictions.ids, labels, predictions.logits)
