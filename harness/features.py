"""What a method reads: views of samples, as features from the bank, or as images where the method trains the image tower.

View e of a sample is what epoch e shows of it, view 0 the sample as it is evaluated. Without a bank features are computed as
they are needed, from the same views.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.backbone import Backbone
from harness.bank import EVALUATION, STORED, FeatureBank
from harness.config import TrainConfig
from harness.data.augment import TrainTransform
from harness.data.reader import ImageDataset, Samples
from harness.progress import Progress
from harness.topology import Topology

SECONDS_TO_ASK_AGAIN = 60.0
FILL_AHEAD = 4096  # views of samples that are put into the bank before training goes on with them


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        inputs: [b, d] L2-normalised features, or [b, 3, H, W] pixels; float32, on the device.
        labels: [b] int64.
        weights: [b] float32 with which each sample's loss counts; over all ranks their mean over ranks is 1 per batch.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor

    def parts(self, size: int | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(inputs, labels, weights) of at most `size` samples each, in order; None: all in one."""
        size = size or len(self.labels)
        return list(zip(self.inputs.split(size), self.labels.split(size), self.weights.split(size), strict=True))


def global_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Positions of each global batch of an epoch: a pure function of its arguments, whatever the number of ranks.

    As in Dassl, a short last batch is dropped when there are at least `batch_size` samples, and is the only one otherwise.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


class Views(Dataset[tuple[Tensor, int]]):
    """(view, position) -> that view of a sample, float32 [3, H, W], and its label.

    Augmentation is keyed by (augmentation seed, view, sample), so a view is the same whoever computes it, and when.
    """

    def __init__(self, samples: Samples, backbone: Backbone, train: TrainConfig | None) -> None:
        self.samples, self.evaluate = samples, backbone.eval_transform
        self.sizes = (backbone.image_size, backbone.mean, backbone.std)
        self.train = train

    def __getitem__(self, view: tuple[int, int]) -> tuple[Tensor, int]:
        number, position = view
        image, label = self.samples.image(position), int(self.samples.labels[position])
        if number == EVALUATION:
            return self.evaluate(image), label
        assert self.train is not None and self.train.augmentation_seed is not None, "a resolved recipe is needed"
        size, mean, std = self.sizes
        seed, scale, flip = self.train.augmentation_seed, self.train.crop_scale, self.train.flip
        transform = TrainTransform(size, mean, std, seed, number, scale, flip)
        return transform(image, str(self.samples.keys[position])), label


@dataclass(frozen=True)
class Loading:
    """How images are loaded: per process, images at a time and processes that decode."""

    batch_size: int = 64
    workers: int = 0


class TrainingViews:
    """This rank's batches of training views, epoch by epoch.

    Order is keyed by (seed, epoch), so that the global batches are the same for any number of ranks and loader processes.

    Args:
        needs: "features" or "images".
        bank: where features are stored; None computes them anew.
    """

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        needs: str,
        train: TrainConfig,
        seed: int,
        topology: Topology,
        loading: Loading,
        bank: FeatureBank | None = None,
    ) -> None:
        self.samples, self.backbone, self.needs, self.train = samples, backbone, needs, train
        self.seed, self.topology, self.loading, self.bank = seed, topology, loading, bank

    @property
    def steps_per_epoch(self) -> int:
        return len(global_batches(len(self.samples), self.train.batch_size, self.seed, epoch=1))

    def view(self, epoch: int) -> int:
        """Which view an epoch shows: its own, or with `train.views` = K one of K in turn."""
        return epoch if self.train.views == "all" else (epoch - 1) % self.train.views + 1

    def epochs(self, count: int, done: int = 0) -> Iterator[tuple[int, Iterator[Batch]]]:
        """Epochs up to `count`, counted from 1, each with this rank's batches, from the batch after `done` batches on.

        Every rank gets as many, each with at least one sample.
        """
        first, skip = done // self.steps_per_epoch + 1, done % self.steps_per_epoch
        loaded = None if self.bank is not None else self._load(count, first, skip)
        for epoch in range(first, count + 1):
            parts = self.parts(epoch)[skip if epoch == first else 0 :]
            if loaded is not None:
                yield epoch, self._from_images(parts, loaded)
            else:
                self._fill_ahead(epoch, first, count)
                yield epoch, self._from_bank(epoch, parts)

    def parts(self, epoch: int) -> list[tuple[list[int], float]]:
        """This rank's positions in each global batch of an epoch, and what each sample's loss counts."""
        world, rank = self.topology.world, self.topology.rank
        parts = []
        for batch in global_batches(len(self.samples), self.train.batch_size, self.seed, epoch):
            mine = batch[rank::world].tolist()
            # The ranks' gradients are averaged, so a sample counts world / (global batch size). A rank with no sample
            # of its own takes part with one that does not count.
            parts.append((mine or batch[:1].tolist(), world / len(batch) if mine else 0.0))
        return parts

    def fill(self) -> None:
        """Put the views of all epochs into the bank, where there is one."""
        for epoch in range(1, self.train.epochs + 1):
            self._fill_ahead(epoch, 1, self.train.epochs)

    def _fill_ahead(self, epoch: int, first: int, count: int) -> None:
        """Put the views of the next epochs into the bank, some at a time."""
        ahead = max(1, FILL_AHEAD // len(self.samples))
        if self.bank is not None and (epoch - first) % ahead == 0:
            dataset = Views(self.samples, self.backbone, self.train)
            views = sorted({self.view(other) for other in range(epoch, min(epoch + ahead, count + 1))})
            fill_bank(self.bank, dataset, views, self.backbone, self.topology, self.loading, "encode views")

    def _load(self, count: int, first: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and labels of all batches that remain: one loader, so that its processes start once and never wait."""
        schedule = _Schedule(self, range(first, count + 1), skip)
        return _load(Views(self.samples, self.backbone, self.train), schedule, self.topology, self.loading)

    def _from_bank(self, epoch: int, parts: Sequence[tuple[list[int], float]]) -> Iterator[Batch]:
        assert self.bank is not None
        rows = self.bank.rows(self.samples.keys)
        for mine, weight in parts:
            features, present = self.bank.read(self.view(epoch), rows[mine])
            assert present.all(), "the bank was filled before"
            yield self._batch(features, torch.from_numpy(self.samples.labels[mine]), weight)

    def _from_images(
        self, parts: Sequence[tuple[list[int], float]], loaded: Iterator[tuple[Tensor, Tensor]]
    ) -> Iterator[Batch]:
        for _, weight in parts:
            pixels, labels = next(loaded)
            inputs = pixels.to(self.topology.device, non_blocking=True)
            if self.needs == "features":
                inputs = image_features(self.backbone, inputs, self.topology)
            yield self._batch(inputs, labels, weight)

    def _batch(self, inputs: Tensor, labels: Tensor, weight: float) -> Batch:
        device = self.topology.device
        return Batch(inputs.to(device), labels.to(device), torch.full((len(labels),), weight, device=device))


class _Schedule:
    """The (view, position) pairs of each batch of this rank, epoch after epoch, without the first `skip` batches."""

    def __init__(self, views: TrainingViews, epochs: range, skip: int) -> None:
        self.views, self.epochs, self.skip = views, epochs, skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            view = self.views.view(epoch)
            for mine, _ in self.views.parts(epoch)[self.skip if epoch == self.epochs[0] else 0 :]:
                yield [(view, position) for position in mine]


@torch.no_grad()
def image_features(backbone: Backbone, pixels: Tensor, topology: Topology) -> Tensor:
    """L2-normalised features [b, d] of pixels [b, 3, H, W], float32, rounded to the run's precision.

    Rounded, so that they are the same whether they come from a bank, which stores them in that precision, or not.
    """
    with topology.autocast():
        return backbone.encode_images(pixels).to(STORED[topology.precision][1]).float()


def bank_facts(backbone: str, dataset: str, split: str, precision: str, train: TrainConfig | None) -> dict[str, Any]:
    """What determines the features of a split: digests of backbone and dataset, precision, and the augmentation if any."""
    facts: dict[str, Any] = {"backbone": backbone, "dataset": dataset, "split": split, "precision": precision}
    if train is not None:
        augmentation = {"seed": train.augmentation_seed, "crop_scale": list(train.crop_scale), "flip": train.flip}
        facts["augmentation"] = augmentation
    return facts


def fill_bank(
    bank: FeatureBank,
    dataset: Views,
    views: Sequence[int],
    backbone: Backbone,
    topology: Topology,
    loading: Loading,
    description: str,
) -> None:
    """Compute what a bank lacks of some views of samples; all ranks share the work. Waits while another run fills it."""
    lock = bank.lock()
    while not topology.from_main(topology.is_main and _acquired(lock)):
        continue
    try:
        rows = bank.rows(dataset.samples.keys)
        missing = [(view, int(place)) for view in views for place in np.flatnonzero(~bank.read(view, rows)[1])]
        if topology.is_main:
            bank.reserve(views)
        mine = topology.from_main(missing)[topology.share(len(missing))]
        batches = [mine[first : first + loading.batch_size] for first in range(0, len(mine), loading.batch_size)]
        if topology.from_main(bool(missing)):
            with Progress(description, len(mine), "images") as progress:
                for batch, (pixels, _) in zip(batches, _load(dataset, batches, topology, loading), strict=True):
                    features = image_features(backbone, pixels.to(topology.device, non_blocking=True), topology).cpu()
                    for view in {view for view, _ in batch}:
                        chosen = [index for index, (own, _) in enumerate(batch) if own == view]
                        bank.write(view, rows[[batch[index][1] for index in chosen]], features[chosen])
                    progress.advance(len(batch))
        topology.gather([])  # nobody reads before everybody has written
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    """Wait a while for a lock: shorter than the time after which waiting ranks would give up."""
    try:
        lock.acquire(timeout=SECONDS_TO_ASK_AGAIN)
    except Timeout:
        return False
    return True


def _load(
    dataset: Views, batches: Iterable[list[tuple[int, int]]], topology: Topology, loading: Loading
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels [b, 3, H, W] and labels [b] of batches of (view, position)."""
    pinned = topology.device.type == "cuda"
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=loading.workers, pin_memory=pinned))


@torch.no_grad()
def encode_samples(
    backbone: Backbone,
    samples: Samples,
    *,
    batch_size: int = 64,
    workers: int = 0,
    description: str = "encode images",
) -> Tensor:
    """L2-normalised features [N, d] (float32, CPU) of samples in their order, with the backbone's own preprocessing."""
    features = []
    device = backbone.logit_scale.device
    with Progress(description, len(samples), "images") as progress:
        for pixels in evaluation_pixels(backbone, samples, batch_size, workers):
            features.append(backbone.encode_images(pixels.to(device)).cpu())
            progress.advance(len(pixels))
    return torch.cat(features) if features else torch.empty(0, backbone.dim)


def evaluation_pixels(backbone: Backbone, samples: Samples, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Batches of pixels [b, 3, H, W] float32 of samples in their order, with the backbone's own preprocessing."""
    dataset = ImageDataset(samples, lambda image, key: backbone.eval_transform(image))
    for pixels, _, _ in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
        yield pixels
