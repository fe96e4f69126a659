"""A 2D set of MedMNIST as published: one .npz of uint8 images and labels by split, 28 to 224 pixels wide, grey or RGB.

Class names are those of the set's card, which the file's name tells: pneumoniamnist.npz and pneumoniamnist_224.npz are
PneumoniaMNIST. Grades (RetinaMNIST) are declared as such; sets of several labels per image (ChestMNIST) and volumes are refused.
The arrays are read as a stream, one image at a time, and never unpickled.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from vipbench.harness.data.cards import Card, card_names, load_card
from vipbench.harness.data.images import DECODE_ERRORS, BadImage, check_size, png
from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.data.info import MAX_SAMPLES, SPLITS
from vipbench.harness.errors import UserError

RESOLUTION = re.compile(r"_[0-9]{1,4}$")
DAMAGED = (*DECODE_ERRORS, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError)  # the last of encrypted archives


@dataclass(frozen=True)
class Pixels:
    """An image as an array, [H, W] or [H, W, 3] uint8."""

    array: np.ndarray

    def read(self) -> bytes:
        """The image as a PNG file."""
        return png(Image.fromarray(self.array))


def read(file: Path, classes: list[str] | None = None, image_root: Path | None = None) -> Source:
    """List the images of FILE. Classes are those of the set's card unless given in the order of their labels.

    Raises:
        UserError: no file of this kind, of an unknown set without `classes`, or no classification of 2D images.
    """
    if image_root:
        raise UserError("--image-root: the file holds its images; leave the option out")
    card = _card(file)
    if card and card.task == "multi-label":
        raise UserError(
            f"{file}: an image of {card.title} has several labels (multi-label), and an image has one class here"
        )
    if classes is None and card is None:
        sets = ", ".join(name for name in card_names() if name.endswith("mnist"))
        raise UserError(f"{file}: its name is that of no set ({sets}); name its classes in order with --classes A,B,C")
    names = classes or (card.classes if card else [])
    records: list[Record] = []
    try:
        with zipfile.ZipFile(file) as archive:
            splits = [split for split in SPLITS if f"{split}_images.npy" in archive.namelist()]
            if not splits:
                raise UserError(f"{file}: holds no train_images, val_images or test_images, as MedMNIST's files do")
            for split in splits:
                labels = _labels(archive, split, file, len(names))
                count = _shape(archive, split, file)[0]
                if count != len(labels):
                    raise UserError(f"{file}: {split} has {count} images and {len(labels)} labels")
                records += [
                    Record(f"{split}/{number:06d}", file, int(label), split, inside=f"{split} image {number}")
                    for number, label in enumerate(labels)
                ]
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{file}: not a whole .npz file: {error}") from error
    ordinal = card is not None and card.task == "ordinal"
    notes = [f"{card.title}'s classes are grades: results have quadratic kappa"] if card and ordinal else []
    return Source(list(names), records, notes, lambda: _images(file, splits), ordinal=ordinal)


def _card(file: Path) -> Card | None:
    name = RESOLUTION.sub("", file.stem.lower())
    return load_card(name) if name in card_names() else None


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array in a .npy file, which is then read up to its values."""
    version = npy.read_magic(member)
    return npy.read_array_header_1_0(member) if version == (1, 0) else npy.read_array_header_2_0(member)


def _shape(archive: zipfile.ZipFile, split: str, file: Path) -> tuple[int, ...]:
    """The shape of a split's images, [N, H, W] or [N, H, W, 3]. Raises UserError where they are others."""
    name = f"{split}_images"
    with archive.open(f"{name}.npy") as member:
        shape, columns_first, kind = _header(member)
    if len(shape) == 4 and shape[-1] != 3:
        raise UserError(f"{file}: {name} are volumes, {list(shape)}; 2D images are [N, H, W] or [N, H, W, 3]")
    if len(shape) not in (3, 4) or min(shape[1:]) < 1 or kind != np.uint8 or columns_first:
        raise UserError(
            f"{file}: {name} are {list(shape)} of {kind}; they should be [N, H, W] or [N, H, W, 3] of uint8"
        )
    try:
        check_size(shape[2], shape[1])
    except BadImage as error:
        raise UserError(f"{file}: an image {error}") from error
    return shape


def _labels(archive: zipfile.ZipFile, split: str, file: Path, classes: int) -> np.ndarray:
    """[N] labels of a split. Raises UserError where they are not one class for each image."""
    name = f"{split}_labels"
    with archive.open(f"{name}.npy") as member:
        shape, columns_first, kind = _header(member)
        columns = math.prod(shape[1:]) if shape else 0
        if columns > 1:
            raise UserError(
                f"{file}: {name} are {list(shape)}: several labels of one image (multi-label), and an image has one class here"
            )
        if columns != 1 or kind.kind not in "ui" or (columns_first and len(shape) > 1 and min(shape) > 1):
            raise UserError(f"{file}: {name} are {list(shape)} of {kind}; they should be [N, 1] whole numbers")
        if not 0 <= shape[0] <= MAX_SAMPLES:
            raise UserError(f"{file}: {name} are of {shape[0]} images; there may be {MAX_SAMPLES}")
        labels = np.frombuffer(_exactly(member, shape[0] * kind.itemsize), kind)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{file}: {name} go from {labels.min()} to {labels.max()}; {classes} classes are named")
    return labels


def _exactly(member: IO[bytes], size: int) -> bytes:
    data = member.read(size)
    if len(data) < size:
        raise EOFError(f"an array ends after {len(data)} of its {size} bytes")
    return data


def _images(file: Path, splits: list[str]) -> Iterator[Pixels]:
    try:
        with zipfile.ZipFile(file) as archive:
            for split in splits:
                shape = _shape(archive, split, file)
                with archive.open(f"{split}_images.npy") as member:
                    _header(member)
                    for _ in range(shape[0]):
                        data = _exactly(member, math.prod(shape[1:]))
                        yield Pixels(np.frombuffer(data, np.uint8).reshape(shape[1:]))
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{file}: not a whole .npz file: {error}") from error
