"""Predictions: every sample exactly once, on any number of ranks. Predictions are written; metrics derive from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness.backbone import Backbone
from harness.bank import FeatureBank
from harness.data.reader import Samples
from harness.features import fill_bank, image_features
from harness.method import Method
from harness.metrics import compute_metrics
from harness.progress import Progress
from harness.topology import Topology
from harness.views import EVALUATION, Loading, Views


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
        self.dataset = Views(samples, backbone, None, loading)
        self.mine = np.arange(len(samples))[topology.share(len(samples))]
        self.good = np.ones(len(self.mine), dtype=bool)  # which of them are not damaged, as far as it is known
        self.passes = topology.passes(len(samples), loading.batch_size)
        self.features: Tensor | None = None  # of this rank's samples, [n, d]

    @torch.no_grad()
    def predict(self, method: Method) -> Predictions:
        """Logits of all samples but damaged ones that are skipped, the same on every rank."""
        method.eval()
        if self.needs == "features" and self.features is None:
            self.features = self._encode()
        if self.features is not None:
            parts = self.features.split(self.loading.batch_size)
            with self.topology.autocast():
                computed = self.topology.each(method, parts, self.passes, (self.backbone.dim,))
                logits = torch.cat([part.float().cpu() for part in computed])
        else:
            logits = self._run(method, f"predict {self.name} images")
        good = self.mine[self.good].tolist()
        rows = sorted(self.topology.gather(zip(good, logits.numpy()[self.good], strict=True)), key=lambda row: row[0])
        places = [place for place, _ in rows]
        left_out = self.topology.gather(self.mine[~self.good].tolist())
        assert sorted(places + left_out) == list(range(len(self.samples))), "a sample was lost or counted twice"
        stacked = np.stack([row for _, row in rows]) if rows else np.empty((0, len(method.task.classes)), np.float32)
        kept = self.samples.select(places)
        return Predictions(kept.keys, kept.labels, stacked)

    def fill(self) -> None:
        """Put the features of all samples into the bank, where there is one."""
        if self.bank is not None:
            fill_bank(self.bank, self.dataset, [EVALUATION], self.backbone, self.topology, f"encode {self.name} images")

    def _encode(self) -> Tensor:
        """Features [n, d] of this rank's samples, from the bank if there is one."""
        if self.bank is None:
            forward = partial(image_features, self.backbone, topology=self.topology)
            return self._run(forward, f"encode {self.name} images")
        self.fill()
        features, self.good = self.bank.read(EVALUATION, self.samples.rows[self.mine])
        assert self.good.all() or self.loading.on_error == "skip", "the bank was filled before"
        return features

    def _run(self, forward: Callable[[Tensor], Tensor], description: str) -> Tensor:
        """Pass this rank's images through `forward`: [n, ...] float32 on the CPU."""
        size, parts, good = self.loading.batch_size, [], []
        positions = [(EVALUATION, place) for place in self.mine.tolist()]
        batches = [positions[first : first + size] for first in range(0, len(positions), size)]

        def pixels() -> Iterator[Tensor]:
            for loaded in self.dataset.load(batches, self.topology.device):
                good.append(loaded.good.numpy())
                yield loaded.pixels

        with Progress(description, len(positions), "images") as progress, self.topology.autocast():
            for part in self.topology.each(forward, pixels(), self.passes, self.backbone.pixels_shape):
                parts.append(part.float().cpu())
                progress.advance(len(part))
        self.good = np.concatenate(good) if good else self.good
        return torch.cat(parts) if parts else torch.empty(0, self.backbone.dim)
