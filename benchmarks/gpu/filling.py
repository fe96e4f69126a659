"""Filling the bank from shards of JPEGs (600 x 450), end to end: read, decode, augment, encode, store.

Beside it the parts that it cannot be faster than: loading alone, and the image tower alone on pixels that are there.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.setting import Row, Setting, Workspace, workspace
from benchmarks.measure import median_seconds, synchronize
from vipbench.harness.features.encode import encode_images

BATCH = 128


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """A row for each number of loading processes."""
    with workspace(setting, precision, begin) as place:
        for workers in setting.workers:
            row = {"workers": workers, "precision": place.precision}
            yield place.attempt(row, partial(_row, place, setting, workers))


def _row(place: Workspace, setting: Setting, workers: int) -> Row:
    out = place.folder / f"bank-{workers}"
    job = place.job("vip", run={"workers": workers, "eval_batch_size": BATCH, "out": str(out)})
    assert job.training is not None
    source = job.training.data.source
    views = list(range(1, setting.views + 1))
    count = len(source.samples) * len(views)
    positions = [(view, place) for view in views for place in range(len(source.samples))]
    began = time.perf_counter()
    for loaded in source.images.load(
        [positions[first : first + BATCH] for first in range(0, count, BATCH)], torch.device("cpu")
    ):
        assert len(loaded.pixels)
    loading = count / (time.perf_counter() - began)
    pixels = torch.randn(BATCH if place.device == "cuda" else 2, *source.backbone.pixels_shape, device=place.device)
    encode = partial(encode_images, source.backbone, pixels, place.topology)
    tower = len(pixels) / median_seconds(encode, setting.repeats)
    synchronize()
    began = time.perf_counter()
    source.fill(views)
    filled = count / (time.perf_counter() - began)
    shutil.rmtree(out)
    found = {"images": count, "filled_per_s": filled, "loaded_per_s": loading, "encoded_per_s": tower}
    return found | {"part_of_slower": filled / min(loading, tower)}
