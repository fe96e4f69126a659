"""Predictions: every sample exactly once, on any number of ranks. Predictions are written; metrics derive from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness.backbone import Backbone
from harness.bank import EVALUATION, FeatureBank
from harness.data.reader import Samples
from harness.features import Loading, Views, evaluation_pixels, fill_bank, image_features
from harness.method import Method
from harness.metrics import compute_metrics
from harness.progress import Progress
from harness.topology import Topology


@dataclass(frozen=True)
class Predictions:
    """Logits of samples in the order of their ids.

    Attributes:
        ids: [N] str, sorted. labels: [N] int64. logits: [N, C] float32.
    """

    ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    def accuracy(self) -> float:
        return float(np.mean(self.logits.argmax(axis=1) == self.labels))

    def metrics(self, classes: list[str]) -> dict[str, object]:
        return compute_metrics(self.labels, self.logits, classes)

    def to_frame(self) -> pd.DataFrame:
        """Columns id, label, logits (a list of C float32)."""
        return pd.DataFrame({"id": self.ids, "label": self.labels, "logits": list(self.logits)})


class EvaluationSet:
    """Samples to predict. What the frozen image tower says of them is computed once, however often a method is asked."""

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        needs: str,
        topology: Topology,
        loading: Loading,
        name: str,
        bank: FeatureBank | None = None,
    ) -> None:
        self.samples, self.backbone, self.needs, self.topology = samples, backbone, needs, topology
        self.loading, self.name, self.bank = loading, name, bank
        self.mine = np.arange(len(samples))[topology.share(len(samples))]
        self.features: Tensor | None = None  # of this rank's samples, [n, d]

    @torch.no_grad()
    def predict(self, method: Method) -> Predictions:
        """Logits of all samples, the same on every rank."""
        method.eval()
        if self.needs == "features" and self.features is None:
            self.features = self._encode()
        if self.features is not None:
            with self.topology.autocast():
                parts = [
                    method(part.to(self.topology.device)).float().cpu()
                    for part in self.features.split(self.loading.batch_size)
                ]
            logits = torch.cat(parts) if parts else torch.empty(0, len(method.task.classes))
        else:
            logits = self._run(method, f"predict {self.name} images")
        rows = self.topology.gather(zip(self.mine.tolist(), logits.numpy(), strict=True))
        rows.sort(key=lambda row: row[0])
        assert [position for position, _ in rows] == list(range(len(self.samples))), (
            "a sample was lost or counted twice"
        )
        stacked = (
            np.stack([logit for _, logit in rows]) if rows else np.empty((0, len(method.task.classes)), np.float32)
        )
        return Predictions(self.samples.keys, self.samples.labels, stacked)

    def fill(self) -> None:
        """Put the features of all samples into the bank, where there is one."""
        if self.bank is not None:
            dataset, description = Views(self.samples, self.backbone, None), f"encode {self.name} images"
            fill_bank(self.bank, dataset, [EVALUATION], self.backbone, self.topology, self.loading, description)

    def _encode(self) -> Tensor:
        """Features [n, d] of this rank's samples, from the bank if there is one."""
        if self.bank is None:
            forward = partial(image_features, self.backbone, topology=self.topology)
            return self._run(forward, f"encode {self.name} images")
        self.fill()
        features, present = self.bank.read(EVALUATION, self.bank.rows(self.samples.keys[self.mine]))
        assert present.all(), "the bank was filled before"
        return features

    def _run(self, forward: Callable[[Tensor], Tensor], description: str) -> Tensor:
        """Pass this rank's images through `forward`: [n, ...] float32 on the CPU."""
        samples, parts = self.samples.select(self.mine), []
        with Progress(description, len(samples), "images") as progress, self.topology.autocast():
            for pixels in evaluation_pixels(self.backbone, samples, self.loading.batch_size, self.loading.workers):
                parts.append(forward(pixels.to(self.topology.device)).float().cpu())
                progress.advance(len(pixels))
        return torch.cat(parts) if parts else torch.empty(0, self.backbone.dim)
