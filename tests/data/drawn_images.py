"""Images and folders of images that the data tests read; each key gives another image."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.data.stateless_random import keyed_generator


def drawn(key: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth random image."""
    coarse = keyed_generator("drawn", key).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    """Save an image, by default one that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or drawn(path.as_posix())).save(path, **options)
    return path


def image_folder(root: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
    """Make `counts` images in each folder, such as {"train/nevus": 3}."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            save(root / folder / f"{number:03d}{suffix}")
    return root


def source_of(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("mel", "nev"), **splits: int) -> Source:
    """A source of small JPEGs; `splits` gives images per class in each split, and without it there are no splits."""
    records = []
    for label, name in enumerate(classes):
        for split, count in (splits or {"": per_class}).items():
            for number in range(count):
                key = f"{name}/{split}{number:03d}"
                records.append(Record(key, save(root / f"{key}.jpg"), label, split or None))
    return Source(list(classes), records)
