"""Symptom evidence: the cosine of images with every symptom, as the method of a finished run reads them, beside its logits."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.views import EVALUATION, Loading, Views
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import Predicted, balanced_accuracy
from vipbench.harness.features.encode import check_finite, unnormalised
from vipbench.harness.methods.base import TextClassifier, cosine_logits
from vipbench.harness.runs.api import Run
from vipbench.harness.symptoms.score import score_cosines
from vipbench.harness.system.devices import to_device, to_host
from vipbench.harness.system.progress import Progress

BATCH = 64  # images


class Symptoms(NamedTuple):
    """The P symptoms of a run, class by class.

    Attributes:
        texts: P texts. owners: [P] int64, the class of each.
        weights: [P] of each symptom within its class; None where the method gives them none.
    """

    texts: list[str]
    owners: np.ndarray
    weights: np.ndarray | None


class Evidence(NamedTuple):
    """Logits [N, C] of N images, and their cosines [N, P] with every symptom (P = 0 where the method reads none)."""

    logits: np.ndarray
    cosines: np.ndarray


class Worth(NamedTuple):
    """The worth of each symptom of a run on labelled images, [P] each, NaN where it is undefined.

    Attributes:
        auroc: of the symptom's cosine, images of its class against all others.
        without: change of balanced accuracy when the symptom is left out; None where the method cannot leave one out.
    """

    auroc: np.ndarray
    without: np.ndarray | None


class Explainer:
    """A finished run's method, loaded to look at images; it computes in fp32.

    Attributes:
        symptoms: of the run; None where its method reads none.
    """

    @torch.no_grad()
    def __init__(self, run: Run, device: str = "cpu") -> None:
        self.method = run.method(device)
        self.backbone, self.device = self.method.backbone, self.method.backbone.logit_scale.device
        texts = self.method.task.symptoms or []
        self.symptoms: Symptoms | None = None
        self._features = torch.empty(0, self.backbone.dim, device=self.device)
        if run.config.symptoms:
            weights = self.method.symptom_weights()
            owners = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
            known = None if weights is None else to_host(weights).numpy()
            self.symptoms = Symptoms([text for own in texts for text in own], owners, known)
            self._features = F.normalize(self.method.symptom_features().float(), dim=-1)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Evidence:
        """The evidence of a batch of images, pixels [b, 3, H, W].

        Raises:
            UserError: an output of the model is not finite.
        """
        pixels = to_device(pixels, self.device)
        rows = self.backbone.encode_with_norms(pixels)
        inputs = {"images": pixels, "unnormalised": unnormalised(rows)}.get(self.method.needs, rows[:, :-1])
        logits = to_host(self.method(inputs).logits)
        check_finite(logits, "images")
        return Evidence(logits.numpy(), to_host(rows[:, :-1] @ self._features.T).numpy())

    def look_at(self, samples: Samples) -> Evidence:
        """The evidence of samples, in their order. Raises UserError where one is damaged."""
        parts = [self.look(pixels) for pixels in self._pixels(samples)]
        return Evidence(*map(np.concatenate, zip(*parts, strict=True)))

    @torch.no_grad()
    def worth(self, samples: Samples) -> Worth:
        """The worth of each symptom on samples whose labels are those of the run's classes."""
        assert self.symptoms is not None
        features = torch.cat([self.backbone.encode_images(pixels) for pixels in self._pixels(samples)])
        owners, labels = self.symptoms.owners, samples.labels
        scores, _ = score_cosines(to_host(features @ self._features.T).numpy(), labels, owners)
        aurocs = np.array([np.nan if auroc is None else auroc for auroc, _ in scores])
        left = self.method.leave_one_out()
        if left is None:
            return Worth(aurocs, None)
        assert isinstance(self.method, TextClassifier)
        scale, own = self.method.logit_scale, self.method.class_features()
        logits, others = (to_host(cosine_logits(scale, features, of)).numpy() for of in (own, left))
        return Worth(aurocs, leave_one_out_changes(logits, others, labels, owners))

    def _pixels(self, samples: Samples) -> Iterator[Tensor]:
        """Pixels [b, 3, H, W] of samples on the device, batch by batch."""
        views = Views(samples, self.backbone, None, Loading(BATCH, 0))
        positions = [(EVALUATION, place) for place in range(len(samples))]
        batches = [positions[first : first + BATCH] for first in range(0, len(positions), BATCH)]
        with Progress("look at images", len(samples), "images") as progress:
            for loaded in views.load(batches, self.device):
                yield loaded.pixels
                progress.advance(len(loaded.pixels))


def leave_one_out_changes(logits: np.ndarray, others: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Changes of balanced accuracy [P] when logits [N, C] have for one class those of `others` [N, P], without a symptom."""
    classes = [str(label) for label in range(logits.shape[1])]
    whole = balanced_accuracy(Predicted(labels, logits, classes))
    changes = np.full(len(owners), np.nan)
    for place, (owner, column) in enumerate(zip(owners, others.T, strict=True)):
        if np.isfinite(column).all():
            changed = logits.copy()
            changed[:, owner] = column
            changes[place] = balanced_accuracy(Predicted(labels, changed, classes)) - whole
    return changes


def run_samples(run: Run, split: str, data: str | Path | None = None) -> Samples:
    """A split of the dataset that a run was made with.

    Args:
        data: where the dataset lies now; None: where it lay then.

    Raises:
        UserError: it is not there, or is another one.
    """
    where = data or run.config.data.path
    try:
        dataset = Dataset(where)
    except UserError as error:
        if data:
            raise
        raise UserError(f"{error}; name the place of the run's dataset in --data") from error
    if dataset.info.digest != run.provenance["digests"]["dataset"]:
        raise UserError(f"{where}: not the dataset that {run.path.name} was made with; name that one in --data")
    return dataset.split(split)


def find_samples(samples: Samples, keys: Sequence[str]) -> Samples:
    """The samples with these ids, in that order. Raises UserError for one that is not there."""
    places = {name: place for place, name in enumerate(samples.names.to_pylist())}
    for key in keys:
        if key not in places:
            raise UserError(f"--image: no sample {key!r} in this split; its ids are in the run's predictions.parquet")
    return samples.select([places[key] for key in keys])
