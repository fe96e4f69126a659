"""The source of what methods read: features from the cache, features computed as they are needed, or images.

One class serves training, evaluation and `prepare`. It puts everything on the run's device, and a rank that has no samples takes
part in what all ranks do together.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vipbench.harness.data.augment import Augmentation
from vipbench.harness.data.reader import Samples
from vipbench.harness.data.views import EVALUATION, Loading, Views
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.features.cache import FeatureBank
from vipbench.harness.features.encode import check_finite, encode_images, fill_bank, sharded, unnormalised
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.system.devices import each_to_host, to_device
from vipbench.harness.system.progress import Progress

READ_AT_ONCE = 4096  # rows of a bank, which are checked and copied to the device together

Needs = Literal["features", "unnormalised", "images"]


class Inputs(NamedTuple):
    """Inputs of b samples on the device: values as a method needs them, labels [b] int64, and if each is undamaged [b]."""

    values: Tensor
    labels: Tensor
    good: Tensor


class Source:
    """Inputs made of the samples of a split.

    Args:
        needs: "features" [b, d] L2-normalised, "unnormalised" ones, or "images" [b, 3, H, W]; float32.
        name: of the split, for messages.
        bank: stores features; None computes them anew.
        augmentation: of all views but view 0.

    Attributes:
        images: the views of the samples as pixels; it lists the damaged samples that were skipped.
        mine: positions of this rank's share of the samples.
        seconds_filling: spent on filling the bank, or on waiting for another run that fills it.
    """

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        needs: Needs,
        topology: Topology,
        loading: Loading,
        name: str,
        bank: FeatureBank | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.samples, self.backbone, self.needs, self.topology = samples, backbone, needs, topology
        self.loading, self.name, self.bank = loading, name, bank
        self.images = Views(samples, backbone, augmentation, loading)
        self.mine = np.arange(len(samples))[topology.share(len(samples))]
        self.seconds_filling = 0.0
        self._share: tuple[Tensor, np.ndarray] | None = None  # rows [n, d + 1] of view 0 on the CPU, and which are good

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample's input."""
        return self.backbone.pixels_shape if self.needs == "images" else (self.backbone.dim,)

    def fill(self, views: Sequence[int]) -> None:
        """Put views of all samples into the bank, where there is one; all ranks share the work."""
        if self.bank is not None:
            what = f"encode {self.name} images" if list(views) == [EVALUATION] else "encode views"
            began = time.monotonic()
            try:
                fill_bank(self.bank, self.images, views, self.backbone, self.topology, what)
            finally:
                self.seconds_filling += time.monotonic() - began

    def batches(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[Inputs]:
        """Inputs of batches of (view, position), each of one view; from a bank that was filled with these views before."""
        if self.bank is None:
            for pixels, labels, good in self.images.load(batches, self.topology.device):
                values = pixels
                if self.needs != "images":
                    values = self._values(encode_images(self.backbone, pixels, self.topology))
                yield self._inputs(values, labels, good)
            return
        for block in _blocks(batches):
            positions = np.array([position for batch in block for _, position in batch])
            rows, present = self._stored(block[0][0][0], positions)
            labels = torch.from_numpy(self.samples.labels[positions])
            read = self._inputs(self._values(rows), labels, torch.from_numpy(present))
            sizes = [len(batch) for batch in block]
            yield from map(Inputs, *(part.split(sizes) for part in read))

    def map_share(self, forward: Callable[[Tensor], Tensor], description: str) -> tuple[Tensor | None, np.ndarray]:
        """Outputs [n, ...] float32 on the CPU of `forward` for view 0 of this rank's share, and which samples are good [n].

        Features are computed once, however often it is called. The outputs are None on a rank without samples.

        Raises:
            UserError: an output is not finite.
        """
        if self.needs == "images":
            return self._map_images(forward, description)
        rows, good = self._rows_of_share()
        parts = self._values(rows).split(self.loading.batch_size) if len(rows) else ()
        inputs = (to_device(part, self.topology.device) for part in parts)
        return _joined(self._map(forward, inputs)), good

    def all_rows(self, views: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """Rows [V, N, d + 1] float32 on the CPU of views of all samples, the same on every rank, and which samples are good."""
        self.fill(views)
        if self.bank is not None:
            found = [self._stored(view, np.arange(len(self.samples))) for view in views]
        else:
            found = [self._compute(view) for view in views]
        return torch.stack([rows for rows, _ in found]), np.logical_and.reduce([good for _, good in found])

    def _compute(self, view: int) -> tuple[Tensor, np.ndarray]:
        """Rows [N, d + 1] of a view of all samples, each rank's share computed by that rank."""
        forward = partial(encode_images, self.backbone, topology=self.topology)
        own, good = self._map_images(forward, f"encode {self.name} images", view)
        rows: Iterable[np.ndarray] = [] if own is None else own.numpy()
        found = sorted(
            self.topology.all_gather_objects(zip(self.mine.tolist(), rows, good, strict=True)), key=lambda row: row[0]
        )
        return torch.from_numpy(np.stack([row for _, row, _ in found])), np.array([good for *_, good in found])

    def _rows_of_share(self) -> tuple[Tensor, np.ndarray]:
        """Rows [n, d + 1] of this rank's share as it is evaluated, from the bank if there is one."""
        if self._share is None and self.bank is not None:
            self.fill([EVALUATION])
            self._share = self._stored(EVALUATION, self.mine)
        elif self._share is None:
            forward = partial(encode_images, self.backbone, topology=self.topology)
            rows, good = self._map_images(forward, f"encode {self.name} images")
            self._share = (torch.empty(0, self.backbone.dim + 1) if rows is None else rows), good
        return self._share

    def _stored(self, view: int, positions: np.ndarray) -> tuple[Tensor, np.ndarray]:
        assert self.bank is not None
        rows, present = self.bank.read(view, self.samples.rows[positions])
        assert present.all() or self.loading.on_error == "skip", "the bank was filled before"
        return rows, present

    def _map_images(
        self, forward: Callable[[Tensor], Tensor], description: str, view: int = EVALUATION
    ) -> tuple[Tensor | None, np.ndarray]:
        """Pass this rank's images through `forward`: outputs [n, ...], or None where it has none, and which are good [n]."""
        size, good = self.loading.batch_size, []
        positions = [(view, place) for place in self.mine.tolist()]
        batches = [positions[first : first + size] for first in range(0, len(positions), size)]

        def pixels() -> Iterator[Tensor]:
            for loaded in self.images.load(batches, self.topology.device):
                good.append(loaded.good.numpy())
                yield loaded.pixels

        parts = []
        with Progress(description, len(positions), "images") as progress:
            for part in self._map(forward, pixels(), self.backbone.pixels_shape):
                parts.append(part)
                progress.advance(len(part))
        return _joined(parts), np.concatenate([*good, np.empty(0, bool)])

    def _map(
        self, forward: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], shape: tuple[int, ...] | None = None
    ) -> Iterator[Tensor]:
        """Outputs of `forward` for inputs on the device, as float32 on the CPU."""
        passes = self.topology.passes(len(self.samples), self.loading.batch_size)
        with self.topology.autocast():
            outputs = self.topology.map_batches(forward, inputs, passes, shape or self.shape, sharded(self.backbone))
            for part in each_to_host(outputs):
                check_finite(part, f"{self.name} images")
                yield part

    def _values(self, rows: Tensor) -> Tensor:
        return rows[:, :-1].contiguous() if self.needs == "features" else unnormalised(rows)

    def _inputs(self, values: Tensor, labels: Tensor, good: Tensor) -> Inputs:
        return Inputs(*(to_device(part, self.topology.device) for part in (values, labels, good)))


def _blocks(batches: Iterable[list[tuple[int, int]]]) -> Iterator[list[list[tuple[int, int]]]]:
    """Consecutive batches of (view, position) of one view, about `READ_AT_ONCE` samples at a time."""
    block: list[list[tuple[int, int]]] = []
    for batch in batches:
        if block and (batch[0][0] != block[0][0][0] or sum(map(len, block)) + len(batch) > READ_AT_ONCE):
            yield block
            block = []
        block.append(batch)
    if block:
        yield block


def _joined(parts: Iterable[Tensor]) -> Tensor | None:
    parts = list(parts)
    return torch.cat(parts) if parts else None
