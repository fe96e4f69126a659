"""Predictions: every sample exactly once, on any number of ranks. Predictions are written; metrics derive from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp, softmax

from vipbench.harness.distributed.topology import Topology
from vipbench.harness.evaluation.metrics import Predicted, accuracy, balanced_accuracy, compute_metrics, majority_share
from vipbench.harness.evaluation.statistics.bootstrap import cluster_codes
from vipbench.harness.features.source import Source
from vipbench.harness.methods.base import Method

COLUMNS = ("id", "label", "class", "predicted", "logits", "probabilities")
PATIENT = "patient"  # among the groups


@dataclass(frozen=True)
class Predictions:
    """Logits of samples in the order of their ids.

    Attributes:
        ids: [N] str, sorted. labels: [N] int64. logits: [N, C] float32.
        groups: [N] values each of what samples may be grouped by, None where unknown: "patient" (a pseudonym), metadata.
    """

    ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    groups: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def accuracy(self) -> float:
        return float(np.mean(self.logits.argmax(axis=1) == self.labels))

    def loss(self) -> float:
        """Mean cross-entropy."""
        logits = self.logits.astype(np.float64)
        return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(logits)), self.labels]))

    def metrics(self, classes: list[str], ordinal: bool = False) -> dict[str, object]:
        return compute_metrics(self.labels, self.logits, classes, ordinal)

    def predicted(self, classes: Sequence[str], ordinal: bool = False) -> Predicted:
        """The predictions as statistics take them."""
        return Predicted(self.labels, self.logits, classes, ordinal)

    @property
    def clusters(self) -> np.ndarray | None:
        """The patient of each sample, [N] int; a sample of an unknown one is a cluster of its own. None where all are unknown."""
        return cluster_codes(self.groups.get(PATIENT))

    def summary(self, classes: list[str]) -> str:
        """Accuracy with its references: balanced accuracy, and the share of the most frequent class."""
        of = Predicted(self.labels, self.logits, classes)
        most_frequent = classes[of.confusion.sum(axis=1).argmax()]
        return (
            f"accuracy {accuracy(of):.4f}, balanced accuracy {balanced_accuracy(of):.4f} on {len(self.ids)} images "
            f"(always guessing {most_frequent!r} gives {majority_share(of):.4f})"
        )

    def to_frame(self, classes: Sequence[str]) -> pd.DataFrame:
        """A row per sample: `COLUMNS`, of which class and predicted are names, logits and probabilities lists of C float32, and
        a column of text for each of `groups`."""
        names = np.array(classes, dtype=object)
        probabilities = softmax(self.logits.astype(np.float64), axis=1).astype(np.float32)
        values = (
            self.ids,
            self.labels,
            names[self.labels],
            names[self.logits.argmax(axis=1)],
            list(self.logits),
            list(probabilities),
        )
        return pd.DataFrame(
            dict(zip(COLUMNS, values, strict=True)) | {name: list(own) for name, own in self.groups.items()}
        )


class EvaluationSet:
    """Samples to predict, shared among the ranks. Features of the frozen image tower are computed once, however often a method is
    asked. A rank may have no sample at all.
    """

    def __init__(self, source: Source, topology: Topology) -> None:
        self.source, self.topology = source, topology

    @torch.no_grad()
    def predict(self, method: Method) -> Predictions:
        """Predict all samples, except damaged ones that are skipped; the result is the same on every rank.

        Raises:
            UserError: a logit or a feature is not finite.
        """
        method.eval()
        source, classes = self.source, len(method.task.classes)
        logits, good = source.map_share(lambda inputs: method(inputs).logits, f"predict {source.name} images")
        rows = [] if logits is None else logits.numpy()[good]
        own = zip(source.mine[good].tolist(), rows, strict=True)
        found = sorted(self.topology.all_gather_objects(own), key=lambda row: row[0])
        places = [place for place, _ in found]
        left_out = self.topology.all_gather_objects(source.mine[~good].tolist())
        assert sorted(places + left_out) == list(range(len(source.samples))), "a sample was lost or counted twice"
        stacked = np.stack([row for _, row in found]) if found else np.empty((0, classes), np.float32)
        kept = source.samples.select(places) if left_out else source.samples
        return Predictions(kept.keys, kept.labels, stacked, kept.groups)
