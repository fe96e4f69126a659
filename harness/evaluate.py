"""Predictions: every sample exactly once, on any number of ranks. Predictions are written; metrics derive from them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness.backbone import Backbone
from harness.data.reader import Samples
from harness.features import evaluation_pixels
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
        batch_size: int,
        workers: int,
        name: str,
    ) -> None:
        self.samples, self.backbone, self.needs, self.topology = samples, backbone, needs, topology
        self.batch_size, self.workers, self.name = batch_size, workers, name
        self.mine = np.arange(len(samples))[topology.share(len(samples))]
        self.features: Tensor | None = None  # of this rank's samples, [n, d]

    @torch.no_grad()
    def predict(self, method: Method) -> Predictions:
        """Logits of all samples, the same on every rank."""
        method.eval()
        if self.needs == "features" and self.features is None:
            self.features = self._run(lambda pixels: self.backbone.encode_images(pixels), f"encode {self.name} images")
        if self.features is not None:
            with self.topology.autocast():
                parts = [
                    method(part.to(self.topology.device)).float().cpu() for part in self.features.split(self.batch_size)
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

    def _run(self, forward: "torch.nn.Module | object", description: str) -> Tensor:
        """Pass this rank's images through `forward`: [n, ...] float32 on the CPU."""
        assert callable(forward)
        samples, parts = self.samples.select(self.mine), []
        with Progress(description, len(samples), "images") as progress, self.topology.autocast():
            for pixels in evaluation_pixels(self.backbone, samples, self.batch_size, self.workers):
                parts.append(forward(pixels.to(self.topology.device)).float().cpu())
                progress.advance(len(pixels))
        return torch.cat(parts) if parts else torch.empty(0, self.backbone.dim)
