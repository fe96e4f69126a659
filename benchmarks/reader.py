"""The reader against webdataset's own pipeline, how it scales with loader processes, and its memory at a million samples.

    python -m benchmarks reader

Both read the same shards of 600 x 450 JPEGs, decode, take a random resized crop of 224 pixels and a flip, and batch 32 float32
tensors. webdataset decodes and transforms as we do ("webdataset"), and as its users do, with Pillow and torchvision ("usual").
Memory is that of two loader processes and the main one while they read samples all over an index of 1,000,000 entries.
"""

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from benchmarks.measure import Result
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.augment import Augmentation, TrainTransform, normalised
from vipbench.harness.data.decode import Picture
from vipbench.harness.data.importers import folder as folder_importer
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.data.views import Loading, Views
from vipbench.harness.models.backbone import load_backbone

IMAGES, ROUNDS, ENTRIES, READ = 800, 3, 1_000_000, 8000
BICUBIC = InterpolationMode.BICUBIC
SIZES = ((600, 450), (1024, 1024), (3000, 2000))
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def make_shards(folder: Path) -> Path:
    """Textured pictures as JPEGs, prepared into shards of about 10 MiB."""
    numbers = np.random.default_rng(0)
    for index in range(IMAGES):
        target = folder / "images" / "train" / f"class{index % 2}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{index:05d}.jpg").write_bytes(jpeg(numbers, 600, 450))
    write_dataset(folder_importer.read(folder / "images"), folder / "data", name="reader", shard_bytes=10 * 2**20)
    return folder / "data"


def jpeg(numbers: np.random.Generator, width: int, height: int) -> bytes:
    """A smooth picture with some texture, about as large in bytes as a photograph."""
    coarse = Image.fromarray(numbers.integers(0, 256, (15, 20, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    textured = (smooth + numbers.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(textured).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(samples: Samples, workers: int) -> Iterator[Tensor]:
    """Batches from our reader, in a shuffled order."""
    views = Views(samples, backbone(), Augmentation(0), Loading(workers=workers))
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    batches = [[(1, place) for place in order[first : first + 32]] for first in range(0, len(order), 32)]
    return (batch.pixels for batch in views.load(batches, torch.device("cpu")))


def theirs(shards: list[str], workers: int, same: bool) -> Iterator[Tensor]:
    """Batches from webdataset's pipeline: shards split over processes, a shuffle buffer, decoding, and a transform: the same as
    ours, or what its users write with "pil" and torchvision."""
    ours = TrainTransform(224, seed=0, epoch=1)
    usual = Compose(
        [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)]
    )

    def view(sample: dict[str, Any]) -> tuple[Tensor, int]:
        if same:
            pixels = normalised(ours(Picture(sample["jpg"]), sample["__key__"])[None], MEAN, STD)[0]
            return pixels, json.loads(sample["json"])["label"]
        return usual(sample["jpg"]), sample["json"]["label"]

    pipeline = wds.WebDataset(shards, shardshuffle=100, seed=0).shuffle(1000)
    pipeline = (pipeline if same else pipeline.decode("pil")).map(view).batched(32)
    return (pixels for pixels, _ in wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def rate(batches: Iterator[Tensor]) -> tuple[float, float]:
    """Samples/s of a whole epoch, from the start of the loader's processes; and milliseconds of CPU a sample in this one."""
    began, busy = time.perf_counter(), time.process_time()
    count = sum(len(batch) for batch in batches)
    return count / (time.perf_counter() - began), (time.process_time() - busy) / count * 1e3


def measure() -> Result:
    """Samples/s of both, and memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        samples = Dataset(make_shards(Path(name))).split("train")
        rows, cpu = [], ""
        for workers in (0, 1, 2):
            rounds = [_round(samples, workers) for _ in range(ROUNDS)]
            mine, other, usual = (median(one[kind][0] for one in rounds) for kind in range(3))
            ratio = median(one[0][0] / one[1][0] for one in rounds)
            row = {"ours_per_s": mine, "webdataset_per_s": other, "ratio": ratio, "usual_per_s": usual}
            rows.append({"workers": workers, **row})
            if not workers:
                spent = [min(one[kind][1] for one in rounds) for kind in range(3)]
                cpu = "CPU ms a sample: ours {:.2f}, webdataset {:.2f}, usual {:.2f}".format(*spent)
        notes = [cpu, _memory(samples), _decode_times()]
    return Result("Samples/s: shards -> decoded, augmented 224 x 224 tensors (JPEGs of 600 x 450)", rows, notes)


def _round(samples: Samples, workers: int) -> list[tuple[float, float]]:
    """One after the other, so that what else the machine does falls on all."""
    shards = [shard.path for shard in samples.files]
    pipelines = (ours(samples, workers), theirs(shards, workers, same=True), theirs(shards, workers, same=False))
    return [rate(pipeline) for pipeline in pipelines]


def _memory(samples: Samples) -> str:
    """Measure the memory of an index of a million entries, before and after reading."""
    many = replace(samples.select(np.arange(ENTRIES) % len(samples)), rows=np.arange(ENTRIES), split_size=ENTRIES)
    arrays = (many.labels, many.rows, many.patient_codes, many.shards, many.offsets, many.sizes, many.digests)
    per_entry = (sum(array.nbytes for array in arrays) + many.names.nbytes) / ENTRIES
    views = Views(many, backbone(), Augmentation(0), Loading(workers=2))
    places = np.random.default_rng(1).permutation(ENTRIES)[:READ].tolist()
    batches = [[(1, place) for place in places[first : first + 32]] for first in range(0, READ, 32)]
    held = []
    for number, _ in enumerate(views.load(batches, torch.device("cpu"))):
        if number in (len(batches) // 2, len(batches) - 4):
            processes = [psutil.Process(), *psutil.Process().children()]
            held.append(sum(process.memory_full_info().pss for process in processes) / 2**20)
    return (
        f"index: {per_entry:.0f} bytes an entry; with {ENTRIES:,} entries main and two loader processes hold {held[0]:.0f} MiB "
        f"(proportional set size) after {READ // 2} samples, {held[1]:.0f} MiB after {READ - 128}"
    )


class Whole(Picture):
    """A picture that is never decoded at a reduced size."""

    def pixels(self, reduction: int = 1) -> np.ndarray:
        return super().pixels()


def _decode_times() -> str:
    """Measure the time of decoding, by the image's size."""
    times = (f"{width} x {height}: {_times_of(width, height)}" for width, height in SIZES)
    return f"ms for a JPEG of {'; '.join(times)}"


def _times_of(width: int, height: int) -> str:
    """Milliseconds for the pixels of a JPEG, and for a training view of all of it."""
    view = TrainTransform(224, seed=0, epoch=1, scale=(1.0, 1.0))
    data = jpeg(np.random.default_rng(0), width, height)
    assert np.array_equal(Picture(data).pixels(), pillow(data)), "the same pixels"
    functions = {
        "pixels": lambda: Picture(data).pixels(),
        "by Pillow": lambda: pillow(data),
        "view": lambda: view(Picture(data), "k"),
        "without reduced decoding": lambda: view(Whole(data), "k"),
    }
    return ", ".join(f"{name} {best(function):.1f}" for name, function in functions.items())


def pillow(data: bytes) -> np.ndarray:
    """Pixels of a JPEG, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def best(function: Callable[[], Any]) -> float:
    """The fewest milliseconds of 15 calls."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


_backbones: list[Any] = []


def backbone() -> Any:
    """A backbone, of which only the size of its images matters here."""
    if not _backbones:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _backbones.append(load_backbone(BackboneConfig(name="ViT-B-32")))
    return _backbones[0]
