"""Predictions: every sample exactly once, on any number of ranks. Predictions are written; metrics derive from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp
from torch import Tensor

from harness.backbone import Backbone
from harness.bank import FeatureBank
from harness.data.reader import Samples
from harness.devices import to_device, to_host
from harness.features import check_finite, fill_bank, image_features
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

    def loss(self) -> float:
        """Mean cross-entropy."""
        logits = self.logits.astype(np.float64)
        return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(logits)), self.labels]))

    def metrics(self, classes: list[str]) -> dict[str, object]:
        return compute_metrics(self.labels, self.logits, classes)

    def summary(self, classes: list[str]) -> str:
        """Accuracy beside what it must be compared with: balanced accuracy, and always guessing the most frequent class."""
        found, counts = self.metrics(classes), np.bincount(self.labels, minlength=len(classes))
        return (
            f"accuracy {found['accuracy']:.4f}, balanced accuracy {found['balanced_accuracy']:.4f} on {len(self.ids)} images "
            f"(always guessing {classes[counts.argmax()]!r} gives {found['majority_share']:.4f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """Columns id, label, logits (a list of C float32)."""
        return pd.DataFrame({"id": self.ids, "label": self.labels, "logits": list(self.logits)})


class EvaluationSet:
    """Samples to predict, shared among the ranks. Features of the frozen image tower are computed once, however often a method is
    asked. A rank may have no sample at all.
    """

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
        self.features: Tensor | None = None  # of this rank's samples, [n, d] on the CPU

    @torch.no_grad()
    def predict(self, method: Method) -> Predictions:
        """Logits of all samples but damaged ones that are skipped, the same on every rank.

        Raises:
            UserError: a logit or a feature is not finite.
        """
        method.eval()
        if self.needs == "features":
            if self.features is None:
                self.features = self._encode()
            batches = self.features.split(self.loading.batch_size) if len(self.mine) else ()
            inputs = (to_device(batch, self.topology.device) for batch in batches)
            parts = list(self._map(method, inputs, (self.backbone.dim,)))
        else:
            parts = self._map_images(method, f"predict {self.name} images")
        logits = torch.cat([*parts, torch.empty(0, len(method.task.classes))])
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
            parts = self._map_images(forward, f"encode {self.name} images")
            return torch.cat([*parts, torch.empty(0, self.backbone.dim)])
        self.fill()
        features, self.good = self.bank.read(EVALUATION, self.samples.rows[self.mine])
        assert self.good.all() or self.loading.on_error == "skip", "the bank was filled before"
        return features

    def _map_images(self, forward: Callable[[Tensor], Tensor], description: str) -> list[Tensor]:
        """Pass this rank's images through `forward`: parts [b, ...], as float32 on the CPU; notes which samples are damaged."""
        size, parts, good = self.loading.batch_size, [], []
        positions = [(EVALUATION, place) for place in self.mine.tolist()]
        batches = [positions[first : first + size] for first in range(0, len(positions), size)]

        def pixels() -> Iterator[Tensor]:
            for loaded in self.dataset.load(batches, self.topology.device):
                good.append(loaded.good.numpy())
                yield loaded.pixels

        with Progress(description, len(positions), "images") as progress:
            for part in self._map(forward, pixels(), self.backbone.pixels_shape):
                parts.append(part)
                progress.advance(len(part))
        self.good = np.concatenate([*good, np.empty(0, bool)])
        return parts

    def _map(
        self, forward: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], shape: Sequence[int]
    ) -> Iterator[Tensor]:
        """Outputs of `forward` for inputs on the device, as float32 on the CPU."""
        with self.topology.autocast():
            for output in self.topology.each(forward, inputs, self.passes, shape):
                part = to_host(output)
                check_finite(part, f"{self.name} images")
                yield part
