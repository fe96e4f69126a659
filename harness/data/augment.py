"""Training views: random resized crop and flip whose randomness is keyed by (augmentation seed, epoch, sample id)."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vipbench.harness.data.decode import Picture
from vipbench.harness.data.stateless_random import keyed_generator
from vipbench.harness.system.devices import to_device

RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Augmentation(NamedTuple):
    """The augmentation of views: its seed, the part of the image's area that a crop covers, and if half are mirrored."""

    seed: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def facts(self) -> dict[str, Any]:
        """The settings in JSON types, which are part of the name of stored features."""
        return {"seed": self.seed, "crop_scale": list(self.crop_scale), "flip": self.flip}


class TrainTransform:
    """Random resized crop (bicubic) and horizontal flip; the same view whoever computes it, and when.

    Args:
        size: pixels of a side of the view.
        seed: the augmentation seed.
        epoch: which view of a sample.
        scale: smallest and largest part of the image's area that a crop covers.
        flip: mirror half of the views.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        epoch: int,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
    ) -> None:
        self.size, self.seed, self.epoch, self.scale, self.flip = size, seed, epoch, scale, flip

    def __call__(self, picture: Picture, key: str) -> Tensor:
        """View of an image file: uint8 [size, size, 3], a quarter of the memory of float32, to which `normalised` converts it.

        A JPEG is decoded at a half, a quarter or an eighth of its size where the crop still has the view's pixels then.

        Raises:
            BadImage: it cannot be decoded.
        """
        random = keyed_generator("augment", self.seed, self.epoch, key)
        box = random_crop(random, picture.width, picture.height, self.scale)
        pixels = picture.pixels(reduction(box, self.size))
        height, width, _ = pixels.shape
        shares = (width / picture.width, height / picture.height) * 2  # 1 where it was decoded whole
        left, top, right, bottom = (round(edge * share) for edge, share in zip(box, shares, strict=True))
        view = Image.fromarray(pixels[top:bottom, left:right])
        view = view.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.flip and random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(view))


def normalised(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Views as a tower reads them: uint8 [b, H, W, 3] -> float32 [b, 3, H, W] on the same device.

    Args:
        mean, std: of each channel, for pixels in 0..1.
    """
    # (pixel / 255 - mean) / std as one product and one sum
    gain, bias = _gain_and_bias(tuple(mean), tuple(std), views.device)
    planes = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(gain).add_(bias)


@lru_cache(maxsize=8)  # copied to a device once
def _gain_and_bias(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    both = ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
    gain, bias = (to_device(torch.tensor(values).reshape(3, 1, 1), device) for values in both)
    return gain, bias


def reduction(box: Box, size: int) -> int:
    """The factor by which an image may shrink for a crop to keep `size` pixels in both directions: 1, 2, 4 or 8."""
    left, top, right, bottom = box
    return next(part for part in (8, 4, 2, 1) if part == 1 or min(right - left, bottom - top) >= part * size)


def random_crop(random: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """Left, top, right, bottom of a crop, by the rule of torchvision's RandomResizedCrop.get_params."""
    for _ in range(TRIES):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # No try fitted: the largest crop from the centre whose ratio is allowed.
    crop_width = min(width, round(height * RATIO[1]))
    crop_height = min(height, round(width / RATIO[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
