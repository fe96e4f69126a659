"""The order of an epoch: every sample once, a pure function of seed and epoch, at one level or at two."""

import numpy as np
import pytest

from tests.data.drawn_images import source_of
from vipbench.harness.data.order import epoch_order
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.data.splits import HoldOut


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("order")
    write_dataset(source_of(folder, train=60), folder / "data", name="o", shard_bytes=6000, hold_out=HoldOut(0, 0))
    samples = Dataset(folder / "data").split("train")
    assert len(samples.files) > 8
    return samples


@pytest.mark.parametrize("block", [None, 1, 7, 16, 1000])
def test_every_sample_once_and_the_same_again(samples: Samples, block: int | None) -> None:
    order = epoch_order(samples, 1, 2, block)
    assert sorted(order.tolist()) == list(range(len(samples)))
    assert np.array_equal(order, epoch_order(samples, 1, 2, block))
    assert not np.array_equal(order, epoch_order(samples, 1, 3, block))
    assert not np.array_equal(order, epoch_order(samples, 2, 2, block))


def test_two_levels_touch_few_shards_at_a_time(samples: Samples) -> None:
    block = 16
    touched = {}
    for kind in (None, block):
        shards = samples.shards[epoch_order(samples, 1, 1, kind)]
        touched[kind] = np.mean([len(set(shards[first : first + block])) for first in range(0, len(shards), block)])
    per_shard = len(samples) / len(samples.files)
    assert touched[block] <= block / per_shard + 2 < touched[None]


def test_two_levels_mix_the_shards_in_another_order_each_epoch(samples: Samples) -> None:
    first = [int(samples.shards[epoch_order(samples, 1, epoch, 4)][0]) for epoch in range(1, 9)]
    assert len(set(first)) > 2
