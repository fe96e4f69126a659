"""The batches of a training: which samples a step reads on which rank, and how much each one counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.data.order import epoch_order
from vipbench.harness.data.stateless_random import keyed_number
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.features.source import Source
from vipbench.harness.system.devices import to_device
from vipbench.harness.training.schedule import steps_per_epoch, total_epochs, total_steps

FILL_AHEAD = 4096  # views of samples that are put into the bank before training goes on with them
SPREAD = np.int64(0x1E3779B97F4A7C15)  # odd, so that samples of a step have different keys


@dataclass(frozen=True)
class Batch:
    """A batch: one rank's part of a global batch.

    Attributes:
        inputs: [b, ...] float32 on the device, as the method needs them.
        labels: [b] int64.
        weights: [b] float32 with which each sample's loss counts; over all ranks their mean over ranks is 1 per batch.
        keys: [b] int64, of the random numbers that a method draws for a sample in this step.
        step_key: int64 scalar, of those that it draws for the step.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    keys: Tensor
    step_key: Tensor

    def parts(self, size: int | None) -> list[tuple[Tensor, ...]]:
        """(inputs, labels, weights, keys, step key) of at most `size` samples each, in order; None: all in one."""
        size = size or len(self.labels)
        columns = (self.inputs, self.labels, self.weights, self.keys)
        parts = zip(*(column.split(size) for column in columns), strict=True)
        return [(*part, self.step_key) for part in parts]


def global_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut the order in which an epoch shows samples into global batches, the same for any number of ranks.

    There are `steps_per_epoch` of them: a short last batch is dropped, unless it is the only one.
    """
    steps = steps_per_epoch(len(order), batch_size)
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


class TrainingBatches:
    """Deal the batches of training views to one rank, epoch by epoch.

    Order is keyed by (seed, epoch), so that the global batches are the same for any number of ranks and loader processes.
    """

    def __init__(self, source: Source, train: TrainConfig, seed: int, topology: Topology) -> None:
        self.source, self.samples, self.train = source, source.samples, train
        self.seed, self.topology = seed, topology

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.samples), self.train.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return total_steps(self.train, len(self.samples))

    @property
    def epochs(self) -> int:
        return total_epochs(self.train, len(self.samples))

    def view(self, epoch: int) -> int:
        """The view that an epoch shows: its own, or with `train.views` = K one of K in turn."""
        return epoch if self.train.views == "all" else (epoch - 1) % self.train.views + 1

    def after(self, done: int) -> Iterator[Batch]:
        """Yield the batches of one rank after the first `done` ones. Every rank gets as many, each with at least one sample."""
        first, skip = done // self.steps_per_epoch + 1, done % self.steps_per_epoch
        # From one stream, so that loading processes start once and never wait.
        stream = None if self.source.bank is not None else self.source.batches(_Schedule(self, first, skip))
        for epoch in range(first, self.epochs + 1):
            parts = self.parts(epoch)[skip if epoch == first else 0 :]
            if stream is None:
                self._fill_ahead(epoch, first)
                inputs = self.source.batches([self._views(epoch, mine) for mine, _ in parts])
            else:
                inputs = stream
            keys = self._keys([mine for mine, _ in parts], done)
            for (_, weight), (sample_keys, step_key) in zip(parts, keys, strict=True):
                values, labels, good = next(inputs)
                yield Batch(values, labels, (good * weight).float(), sample_keys, step_key)
            done += len(parts)

    def parts(self, epoch: int) -> list[tuple[list[int], float]]:
        """List the positions of one rank in each global batch of an epoch, with the weight of each sample's loss."""
        world, rank = self.topology.world, self.topology.rank
        parts = []
        order = epoch_order(self.samples, self.seed, epoch, self.train.shuffle_block)
        for batch in global_batches(order, self.train.batch_size):
            mine = batch[rank::world].tolist()
            # The ranks' gradients are averaged, so a sample counts world / (global batch size). A rank with no sample
            # of its own takes part with one that does not count.
            parts.append((mine or batch[:1].tolist(), world / len(batch) if mine else 0.0))
        return parts[: self.steps - (epoch - 1) * self.steps_per_epoch]

    def fill(self) -> None:
        """Put the views of all epochs into the bank, where there is one."""
        for epoch in range(1, self.epochs + 1):
            self._fill_ahead(epoch, 1)

    def _fill_ahead(self, epoch: int, first: int) -> None:
        """Put the views of the next epochs into the bank, some at a time."""
        ahead = max(1, FILL_AHEAD // len(self.samples))
        if (epoch - first) % ahead == 0:
            views = sorted({self.view(other) for other in range(epoch, min(epoch + ahead, self.epochs + 1))})
            self.source.fill(views)

    def _views(self, epoch: int, mine: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.view(epoch), position) for position in mine]

    def _keys(self, batches: Sequence[Sequence[int]], first_step: int) -> list[tuple[Tensor, Tensor]]:
        """The keys of consecutive steps, on the device: those of the samples [b] int64, and the step's own, a scalar."""
        numbers: list[np.ndarray] = []
        for step, mine in enumerate(batches, first_step):
            step_key = np.int64(keyed_number("draw", self.seed, step))
            numbers += [step_key + np.array(mine, np.int64) * SPREAD, np.array([step_key])]  # wraps around
        if not numbers:
            return []
        keys = to_device(torch.from_numpy(np.concatenate(numbers)), self.topology.device)
        parts = keys.split([len(part) for part in numbers])
        return [(samples, step[0]) for samples, step in zip(parts[::2], parts[1::2], strict=True)]


class _Schedule:
    """The (view, position) pairs of each batch of this rank, epoch after epoch, without the first `skip` batches."""

    def __init__(self, batches: TrainingBatches, first: int, skip: int) -> None:
        self.batches, self.first, self.skip = batches, first, skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first, self.batches.epochs + 1):
            for mine, _ in self.batches.parts(epoch)[self.skip if epoch == self.first else 0 :]:
                yield self.batches._views(epoch, mine)
