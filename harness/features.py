"""What a method reads: views of samples, as features from the bank, or as images where the method trains the image tower.

Without a bank features are computed as they are needed, from the same views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from harness.backbone import Backbone
from harness.bank import STORED, FeatureBank
from harness.config import RESULT_VERSION, TrainConfig
from harness.data.order import epoch_order
from harness.data.reader import Samples
from harness.devices import to_device, to_host
from harness.errors import UserError
from harness.progress import Progress
from harness.topology import Topology
from harness.views import EVALUATION, Loaded, Loading, Views

SECONDS_TO_ASK_AGAIN = 1.0
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


def global_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The global batches of an epoch that shows samples in this order, whatever the number of ranks.

    As in Dassl, a short last batch is dropped when there are at least `batch_size` samples, and is the only one otherwise.
    """
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


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
        self.seed, self.topology, self.bank = seed, topology, bank
        self.dataset = Views(samples, backbone, train, loading)

    @property
    def steps_per_epoch(self) -> int:
        return self.train.steps_per_epoch(len(self.samples))

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
        order = epoch_order(self.samples, self.seed, epoch, self.train.shuffle_block)
        for batch in global_batches(order, self.train.batch_size):
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
            views = sorted({self.view(other) for other in range(epoch, min(epoch + ahead, count + 1))})
            fill_bank(self.bank, self.dataset, views, self.backbone, self.topology, "encode views")

    def _load(self, count: int, first: int, skip: int) -> Iterator[Loaded]:
        """All batches that remain as images: from one loader, so that its processes start once and never wait."""
        return self.dataset.load(_Schedule(self, range(first, count + 1), skip), self.topology.device)

    def _from_bank(self, epoch: int, parts: Sequence[tuple[list[int], float]]) -> Iterator[Batch]:
        assert self.bank is not None
        for mine, weight in parts:
            features, present = self.bank.read(self.view(epoch), self.samples.rows[mine])
            assert present.all() or self.dataset.loading.on_error == "skip", "the bank was filled before"
            yield self._batch(features, torch.from_numpy(self.samples.labels[mine]), torch.from_numpy(present), weight)

    def _from_images(self, parts: Sequence[tuple[list[int], float]], loaded: Iterator[Loaded]) -> Iterator[Batch]:
        for _, weight in parts:
            inputs, labels, good = next(loaded)
            if self.needs == "features":
                inputs = image_features(self.backbone, inputs, self.topology)
            yield self._batch(inputs, labels, good, weight)

    def _batch(self, inputs: Tensor, labels: Tensor, good: Tensor, weight: float) -> Batch:
        device = self.topology.device
        inputs, labels, weights = (to_device(part, device) for part in (inputs, labels, (good * weight).float()))
        return Batch(inputs, labels, weights)


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


def check_finite(outputs: Tensor, what: str) -> None:
    """Raise UserError where outputs of the model [b, ...] on the CPU hold NaN or infinity, before more work is done with them."""
    bad = int((~outputs.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        raise UserError(
            f"{what}: the model's output is not finite for {bad} of {len(outputs)}; check the backbone's weights, or use "
            "precision=fp32"
        )


def bank_facts(
    backbone: str,
    dataset: str,
    split: str,
    precision: str,
    train: TrainConfig | None,
    *,
    device: str,
    compiled: bool,
) -> dict[str, Any]:
    """List all that determines the features of a split: what goes in, the augmentation if any, the result version, and all that
    rounds differently.

    Args:
        backbone, dataset: digests.
        device: "cpu" or "cuda".
        compiled: whether the image tower runs through torch.compile.
    """
    facts: dict[str, Any] = {"backbone": backbone, "dataset": dataset, "split": split, "result_version": RESULT_VERSION}
    facts |= {"precision": precision, "device": device, "compiled": compiled}
    if train is not None:
        augmentation = {"seed": train.augmentation_seed, "crop_scale": list(train.crop_scale), "flip": train.flip}
        facts["augmentation"] = augmentation
    return facts


def fill_bank(
    bank: FeatureBank, dataset: Views, views: Sequence[int], backbone: Backbone, topology: Topology, description: str
) -> None:
    """Compute what a bank lacks of some views of samples; all ranks share the work. Waits while another run fills it.

    Damaged samples that are skipped stay missing.

    Raises:
        Stopped: a signal asked for an end; what was computed is in the bank.
    """
    lock = bank.lock()
    topology.signals.looks.restart()
    while not topology.from_main(topology.is_main and _acquired(lock)):
        topology.signals.heed()
    try:
        rows, size = dataset.samples.rows, dataset.loading.batch_size
        absent = [(view, int(place)) for view in views for place in np.flatnonzero(~bank.read(view, rows)[1])]
        missing = topology.from_main(absent)
        if topology.is_main:
            bank.reserve([(view, int(rows[place])) for view, place in missing])
        mine = missing[topology.share(len(missing))]
        batches = [mine[first : first + size] for first in range(0, len(mine), size)]
        if missing:
            with Progress(description, len(mine), "images") as progress:
                pixels = (loaded.pixels for loaded in dataset.load(batches, topology.device))
                forward = partial(image_features, backbone, topology=topology)
                passes = topology.passes(len(missing), size)
                computed = topology.each(forward, pixels, passes, backbone.pixels_shape)
                for batch, features in zip(batches, map(to_host, computed), strict=True):
                    _store(bank, dataset, batch, features)
                    progress.advance(len(batch))
        topology.gather([])  # nobody reads before everybody has written
    finally:
        lock.release()


def _store(bank: FeatureBank, dataset: Views, batch: list[tuple[int, int]], features: Tensor) -> None:
    """Put the features [b, d] of a batch of (view, position) into a bank, but for damaged samples.

    Raises:
        UserError: a feature is not finite.
    """
    good = [place for place, (_, position) in enumerate(batch) if dataset.samples.key(position) not in dataset.skipped]
    for view in {batch[place][0] for place in good}:
        chosen = [place for place in good if batch[place][0] == view]
        check_finite(features[chosen], "encode images")
        bank.write(view, dataset.samples.rows[[batch[place][1] for place in chosen]], features[chosen])


def _acquired(lock: FileLock) -> bool:
    """Wait for a lock as long as a signal may wait to be heeded."""
    try:
        lock.acquire(timeout=SECONDS_TO_ASK_AGAIN)
    except Timeout:
        return False
    return True


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
    dataset, features = Views(samples, backbone, None, Loading(batch_size, workers)), []
    positions = [(EVALUATION, place) for place in range(len(samples))]
    batches = [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    device = backbone.logit_scale.device
    with Progress(description, len(samples), "images") as progress:
        for loaded in dataset.load(batches, device):
            features.append(to_host(backbone.encode_images(loaded.pixels)))
            progress.advance(len(loaded.labels))
    return torch.cat(features) if features else torch.empty(0, backbone.dim)
