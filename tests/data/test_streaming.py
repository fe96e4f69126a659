"""Exact streaming: the global batches are the same for any number of ranks and loader processes, resumed at any step or not."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.data.augment import Augmentation
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.views import Loading
from vipbench.harness.features.source import Source
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.training.batches import Batch, TrainingBatches

EPOCHS, BATCH = 2, 5
STEPS = 2 * 3  # 18 images: three whole batches of an epoch, and three images left out


class Ranks:
    """One rank of a world that is simulated."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.device = rank, world, torch.device("cpu")

    def share(self, count: int) -> slice:
        return slice(self.rank, count, self.world)


@pytest.fixture(scope="module")
def samples(dataset: Path) -> Samples:
    """Training samples whose labels are their positions, so that a batch tells which samples it holds."""
    samples = Dataset(dataset).split("train")
    return replace(samples, labels=np.arange(len(samples)))


def batches(
    samples: Samples,
    backbone: Backbone,
    rank: int,
    world: int,
    workers: int,
    done: int,
    size: int = BATCH,
    block: int | None = None,
) -> list[Batch]:
    train = TrainConfig(epochs=EPOCHS, batch_size=size, augmentation_seed=7, shuffle_block=block)
    topology = Ranks(rank, world)
    augmentation = Augmentation(7, train.crop_scale, train.flip)
    source = Source(samples, backbone, "images", topology, Loading(workers=workers), "train", None, augmentation)  # type: ignore[arg-type]
    return list(TrainingBatches(source, train, 3, topology).after(done))  # type: ignore[arg-type]


def global_batches(
    samples: Samples, backbone: Backbone, world: int, workers: int, done: int, block: int | None = None
) -> list[tuple[list[int], Tensor]]:
    """Ids and pixels of each global batch, put together from what all ranks of a world get."""
    ranks = [batches(samples, backbone, rank, world, workers, done, BATCH, block) for rank in range(world)]
    whole = []
    for parts in zip(*ranks, strict=True):
        rows = {}
        for rank, part in enumerate(parts):
            real = part.weights > 0
            for place, (label, pixels) in enumerate(zip(part.labels[real].tolist(), part.inputs[real], strict=True)):
                rows[place * world + rank] = (label, pixels)
        ordered = [rows[place] for place in sorted(rows)]
        whole.append(([label for label, _ in ordered], torch.stack([pixels for _, pixels in ordered])))
    return whole


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_world_any_workers_resumed_at_every_step(
    samples: Samples, vit_backbone: Backbone, world: int, workers: int, block: int | None
) -> None:
    expected = global_batches(samples, vit_backbone, world=1, workers=0, done=0, block=block)
    assert len(expected) == STEPS
    for done in range(STEPS):
        found = global_batches(samples, vit_backbone, world, workers, done, block)
        assert [ids for ids, _ in found] == [ids for ids, _ in expected[done:]]
        assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, expected[done:], strict=True))


def test_an_epoch_shows_each_sample_at_most_once_and_the_next_another_view(
    samples: Samples, vit_backbone: Backbone
) -> None:
    found = global_batches(samples, vit_backbone, world=1, workers=0, done=0)
    first, second = found[: STEPS // 2], found[STEPS // 2 :]
    for epoch in (first, second):
        ids = [number for batch, _ in epoch for number in batch]
        assert len(set(ids)) == len(ids) == STEPS // 2 * BATCH
    assert [ids for ids, _ in first] != [ids for ids, _ in second]
    views = [
        {number: pixels for ids, batch in epoch for number, pixels in zip(ids, batch, strict=True)}
        for epoch in (first, second)
    ]
    assert not any(torch.equal(views[0][number], views[1][number]) for number in views[0].keys() & views[1].keys())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_takes_part_in_batches_smaller_than_the_world(
    samples: Samples, vit_backbone: Backbone, size: int
) -> None:
    world = 4
    ranks = [batches(samples, vit_backbone, rank, world, 0, 0, size) for rank in range(world)]
    assert all(len(first) == len(second) == EPOCHS * (18 // size) for first, second in pairwise(ranks))
    for parts in zip(*ranks, strict=True):
        weights = torch.cat([part.weights for part in parts])
        assert float(weights.sum()) / world == pytest.approx(1.0), (
            "over ranks the mean of the weights is that of one batch"
        )
        assert int((weights > 0).sum()) == size
