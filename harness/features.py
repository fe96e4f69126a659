"""What a method reads: image features (or images) of augmented training views, and of test images once.

Today each epoch's views pass through the image tower as they come; a stored bank of the same views takes the same place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.backbone import Backbone
from harness.config import TrainConfig
from harness.data.augment import TrainTransform
from harness.data.reader import ImageDataset, Samples
from harness.progress import Progress
from harness.topology import Topology


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


def global_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Positions of each global batch of an epoch: a pure function of its arguments, whatever the number of ranks.

    As in Dassl, a short last batch is dropped when there are at least `batch_size` samples, and is the only one otherwise.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


class TrainingViews:
    """Augmented views of the training samples, epoch by epoch.

    Order is keyed by (seed, epoch) and augmentation by (augmentation seed, epoch, sample), so that the global batches are
    the same for any number of ranks and loader processes.
    """

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        needs: str,
        train: TrainConfig,
        seed: int,
        topology: Topology,
        workers: int,
    ) -> None:
        self.samples, self.backbone, self.needs, self.train = samples, backbone, needs, train
        self.seed, self.topology, self.workers = seed, topology, workers

    @property
    def steps_per_epoch(self) -> int:
        return len(global_batches(len(self.samples), self.train.batch_size, self.seed, epoch=1))

    def epochs(self, count: int) -> Iterator[tuple[int, Iterator[Batch]]]:
        """Epochs 1 to `count`, each with this rank's batches. Every rank gets as many, each with at least one sample."""
        # One loader for all epochs: its processes start once, and decode ahead over the end of an epoch.
        loader = DataLoader(
            _Views(self.samples, self.backbone, self.train),
            batch_sampler=_Schedule(self, count),
            num_workers=self.workers,
            pin_memory=self.topology.device.type == "cuda",
        )
        loaded = iter(loader)
        for epoch in range(1, count + 1):
            yield epoch, self._batches(epoch, loaded)

    def parts(self, epoch: int) -> Iterator[tuple[list[int], float]]:
        """This rank's positions in each global batch of an epoch, and what each sample's loss counts."""
        world, rank = self.topology.world, self.topology.rank
        for batch in global_batches(len(self.samples), self.train.batch_size, self.seed, epoch):
            mine = batch[rank::world].tolist()
            # The ranks' gradients are averaged, so a sample counts world / (global batch size). A rank with no sample
            # of its own takes part with one that does not count.
            yield mine or batch[:1].tolist(), world / len(batch) if mine else 0.0

    def _batches(self, epoch: int, loaded: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        device = self.topology.device
        for _, weight in self.parts(epoch):
            pixels, labels = next(loaded)
            inputs = pixels.to(device, non_blocking=True)
            if self.needs == "features":
                with torch.no_grad(), self.topology.autocast():
                    inputs = self.backbone.encode_images(inputs)
            yield Batch(inputs, labels.to(device), torch.full((len(labels),), weight, device=device))


class _Schedule:
    """The (epoch, position) pairs of each batch of this rank, epoch after epoch; for a loader."""

    def __init__(self, views: TrainingViews, epochs: int) -> None:
        self.views, self.epochs = views, epochs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(1, self.epochs + 1):
            for positions, _ in self.views.parts(epoch):
                yield [(epoch, position) for position in positions]

    def __len__(self) -> int:
        return self.epochs * self.views.steps_per_epoch


class _Views(Dataset[tuple[Tensor, int]]):
    """(epoch, position) -> the view of a sample that the epoch shows, float32 [3, H, W], and its label."""

    def __init__(self, samples: Samples, backbone: Backbone, train: TrainConfig) -> None:
        assert train.augmentation_seed is not None, "a resolved config has an augmentation seed"
        self.samples = samples
        self.settings = (backbone.image_size, backbone.mean, backbone.std, train.augmentation_seed)
        self.crop = (train.crop_scale, train.flip)

    def __getitem__(self, view: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = view
        transform = TrainTransform(*self.settings, epoch, *self.crop)
        view_of_image = transform(self.samples.image(position), str(self.samples.keys[position]))
        return view_of_image, int(self.samples.labels[position])


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
