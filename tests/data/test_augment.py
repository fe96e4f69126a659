"""Training views: keyed by (seed, epoch, sample id) alone, and what torchvision makes of the same crop."""

import io
import time
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resized_crop, to_tensor

from tests.data.drawn_images import drawn
from vipbench.harness.data.augment import RATIO, TrainTransform, normalised, random_crop, reduction
from vipbench.harness.data.decode import Picture
from vipbench.harness.data.stateless_random import keyed_generator

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def png(size: tuple[int, int]) -> Picture:
    buffer = io.BytesIO()
    drawn("image", size).save(buffer, "PNG")
    return Picture(buffer.getvalue())


def view(key: str, seed: int = 1, epoch: int = 1, **options: Any) -> torch.Tensor:
    return TrainTransform(32, seed, epoch, **options)(png((60, 50)), key)


def test_view_depends_on_seed_epoch_and_key_only() -> None:
    keys = [f"k{number}" for number in range(20)]
    transform = TrainTransform(32, seed=1, epoch=1)
    image = png((60, 50))
    forward = [transform(image, key) for key in keys]
    np.random.seed(0)
    torch.manual_seed(0)
    backward = [transform(image, key) for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(view("a"), view("b"))
    assert not torch.equal(view("a"), view("a", epoch=2))
    assert not torch.equal(view("a"), view("a", seed=2))
    assert not torch.equal(view("a", seed=1, epoch=11), view("a", seed=11, epoch=1))
    assert torch.equal(view("a"), view("a"))


def test_view_is_torchvisions_for_the_same_crop() -> None:
    image, flipped = drawn("image", (60, 50)), 0
    for number in range(20):
        random = keyed_generator("augment", 1, 1, f"k{number}")
        left, top, right, bottom = random_crop(random, 60, 50, (0.08, 1.0))
        crop = resized_crop(image, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC)
        expected = normalize(to_tensor(crop), MEAN, STD)
        views = torch.stack([view(f"k{number}"), view(f"k{number}", flip=False)])
        assert views.dtype == torch.uint8
        result, unflipped = normalised(views, MEAN, STD)
        assert result.dtype == torch.float32 and result.shape == (3, 32, 32) and result.is_contiguous()
        torch.testing.assert_close(unflipped, expected, atol=1e-5, rtol=0)
        if not torch.allclose(result, expected, atol=1e-5):
            torch.testing.assert_close(result, expected.flip(2), atol=1e-5, rtol=0)
            flipped += 1
    assert 3 <= flipped <= 17


@pytest.mark.parametrize("size", [(60, 50), (33, 200)])
def test_crops_cover_the_given_area_and_ratio(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    boxes = np.array([random_crop(random, size[0], size[1], (0.08, 0.4)) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() == size[0]  # they reach the edges
    assert boxes[:, 3].max() == size[1]
    areas = widths * heights / (size[0] * size[1])
    assert 0.06 < areas.min() < 0.12
    ratios = widths / heights
    assert RATIO[0] - 0.1 < ratios.min() < ratios.max() < RATIO[1] + 0.1
    if size == (60, 50):
        assert abs(areas.mean() - 0.24) < 0.01  # uniform in area


def test_crop_where_none_fits_is_the_largest_in_the_centre() -> None:
    random = np.random.default_rng(0)
    assert random_crop(random, 300, 30, (1.0, 1.0)) == (130, 0, 170, 30)
    assert random_crop(random, 30, 300, (1.0, 1.0)) == (0, 130, 30, 170)
    assert random_crop(random, 1, 1, (0.08, 0.1)) == (0, 0, 1, 1)


@pytest.mark.parametrize(("side", "part"), [(447, 1), (448, 2), (895, 2), (896, 4), (5000, 8)])
def test_a_reduced_image_has_the_pixels_of_the_view(side: int, part: int) -> None:
    assert reduction((10, 0, 10 + side, 6000), 224) == reduction((0, 0, 6000, side), 224) == part


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_view_of_a_large_image_looks_like_that_of_all_its_pixels(format: str) -> None:
    buffer, asked = io.BytesIO(), []
    drawn("image", (301, 247)).save(buffer, format, quality=95)

    class Watched(Picture):
        def pixels(self, reduction: int = 1) -> np.ndarray:
            asked.append(reduction)
            return super().pixels(reduction)

    class Whole(Picture):
        def pixels(self, reduction: int = 1) -> np.ndarray:
            return super().pixels()

    transform = TrainTransform(32, 1, 1)
    for number in range(20):
        reduced = transform(Watched(buffer.getvalue()), f"k{number}")
        whole = transform(Whole(buffer.getvalue()), f"k{number}")
        assert torch.equal(reduced, transform(Picture(buffer.getvalue()), f"k{number}"))
        difference = (reduced.float() - whole).abs().mean()
        assert difference < 7  # of 255
        assert (difference == 0) == (format == "PNG" or asked[-1] == 1)
    assert {2, 4} <= set(asked)


def test_224_pixels_take_a_few_milliseconds_at_most() -> None:
    transform, image = TrainTransform(224, 1, 1), png((300, 260))
    times = []
    for number in range(20):
        start = time.perf_counter()
        transform(image, f"k{number}")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01
