"""Views of samples as pixels: view e of a sample is the one of epoch e, view 0 the sample as it is evaluated."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vipbench.harness.data.augment import Augmentation, TrainTransform, normalised
from vipbench.harness.data.reader import DamagedSample, Samples
from vipbench.harness.errors import UserError
from vipbench.harness.system.devices import to_device
from vipbench.harness.system.signals import SIGNALS

log = logging.getLogger(__name__)

EVALUATION = 0  # the view that is not augmented
SECONDS_TO_OUTLIVE = 30.0  # as long as torchrun and Slurm leave a run to write a checkpoint


@dataclass(frozen=True)
class Loading:
    """Settings for loading images: per process, images at a time and processes that decode; and the effect of a damaged one."""

    batch_size: int = 64
    workers: int = 0
    on_error: Literal["raise", "skip"] = "raise"


class Preprocessing(Protocol):
    """The part of a backbone that turns images into pixels; see `vipbench.harness.models.backbone.Backbone`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_transform: Callable[[Any], Tensor]


class Loaded(NamedTuple):
    """Views of b samples: pixels [b, 3, H, W] float32 on the device, labels [b] int64, and whether each could be read."""

    pixels: Tensor
    labels: Tensor
    good: Tensor


class Views(Dataset[tuple[Tensor, int, int, str, bool]]):
    """Views of samples by (view, position): the view, the sample's label and position, its problem ("" for none), and True
    where it is skipped for that. A view is uint8 [H, W, 3] where it is augmented, float32 [3, H, W] where it is not.

    Augmentation is keyed by (augmentation seed, view, sample), so a view is the same whoever computes it, and when.

    Args:
        augmentation: of all views but view 0; None where only that is asked for.

    Attributes:
        skipped: ids of damaged samples that were left out and why, as far as this process came upon them.
    """

    def __init__(
        self, samples: Samples, backbone: Preprocessing, augmentation: Augmentation | None, loading: Loading
    ) -> None:
        self.samples, self.evaluate, self.loading = samples, backbone.eval_transform, loading
        self.size, self.mean, self.std = backbone.image_size, backbone.mean, backbone.std
        self.augmentation = augmentation
        self.skipped: dict[str, str] = {}

    def __getitem__(self, view: tuple[int, int]) -> tuple[Tensor, int, int, str, bool]:
        number, position = view
        label = int(self.samples.labels[position])
        try:
            return self._pixels(number, position), label, position, "", False
        except UserError as error:  # as a value, since torch would put a loading process's traceback before it
            skip = self.loading.on_error == "skip" and isinstance(error, DamagedSample)
            size = self.size
            blank = torch.zeros(3, size, size) if number == EVALUATION else torch.zeros(size, size, 3).byte()
            return blank, label, position, str(error), skip

    def load(self, batches: Iterable[list[tuple[int, int]]], device: torch.device) -> Iterator[Loaded]:
        """Batches of (view, position), each of augmented views or of view 0 alone; `loading.workers` processes load ahead.

        Raises:
            UserError: a sample is damaged, and `loading.on_error` is "raise"; or a shard is missing.
        """
        pinned = device.type == "cuda"
        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=self.loading.workers,
            pin_memory=pinned,
            worker_init_fn=outlive_signals if self.loading.workers else None,
        )
        for pixels, labels, positions, problems, skips in loader:
            for position, problem, skip in zip(positions.tolist(), problems, skips.tolist(), strict=True):
                if problem and not skip:
                    raise UserError(problem)
                key = self.samples.key(position) if problem else ""
                if problem and key not in self.skipped:
                    self.skipped[key] = problem
                    log.warning("skipped: %s", problem)
            pixels = to_device(pixels, device)
            if pixels.dtype == torch.uint8:
                pixels = normalised(pixels, self.mean, self.std)
            yield Loaded(pixels, labels, torch.tensor([not problem for problem in problems]))

    def _pixels(self, number: int, position: int) -> Tensor:
        if number == EVALUATION:
            return self.evaluate(self.samples.image(position))
        assert self.augmentation is not None, "only view 0 was to be asked for"
        seed, scale, flip = self.augmentation
        transform = TrainTransform(self.size, seed, number, scale, flip)
        key = self.samples.key(position)
        return self.samples.show(position, lambda picture: transform(picture, key))


def outlive_signals(worker: int) -> None:
    """Let a loading process end with its run rather than before it, for a while.

    torchrun and Slurm signal all processes of a run at once, and a run whose loading processes are gone fails where it should
    write a checkpoint.
    """

    def end_later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(SECONDS_TO_OUTLIVE, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()

    for number in SIGNALS:
        signal.signal(number, end_later)
