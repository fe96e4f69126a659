"""The embedded benchmark: four classes of drawn lesions, each a distribution over visual attributes that overlaps the others.

The classes are named after diseases, since methods are given such names; the drawings are no model of any disease.
Several images share a patient (skin, hair, light), and patients are not torn between splits.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vipbench.harness.demo.attributes import BROAD, Distribution, Lesion, sample
from vipbench.harness.demo.draw import Scene, draw, generator

CLASSES = ("melanoma", "nevus", "basal cell carcinoma", "seborrheic keratosis")
IMAGES = {"train": 64, "val": 24, "test": 100}  # per class
IMAGES_PER_PATIENT = 2
OVERLAP = 0.25  # how much of each class's distribution is the broad one that all share

# Weights of the levels that matter; those left out weigh nothing before the broad distribution is mixed in.
TYPICAL: dict[str, Distribution] = {
    "melanoma": {
        "symmetry": {"symmetric": 1, "slightly asymmetric": 3, "asymmetric": 6},
        "border": {"smooth": 1, "uneven": 3, "jagged": 6},
        "edge": {"sharp": 2, "soft": 4, "blurry": 4},
        "size": {"small": 1, "medium": 4, "large": 5},
        "colour": {"dark brown": 5, "black": 4, "light brown": 1},
        "patch_count": {0: 1, 1: 2, 2: 4, 3: 3},
        "patch_colours": {"blue-grey": 4, "white": 2, "red": 2, "black": 2, "light brown": 1},
        "dots": {"none": 3, "few": 3, "many": 4},
        "dot_colour": {"black": 6, "blue-grey": 3, "brown": 1},
        "streaks": {"none": 5, "few": 2, "many": 3},
        "veil": {"none": 5, "present": 5},
        "network": {"none": 5, "present": 5},
        "surface": {"smooth": 6, "rough": 3, "shiny": 1},
        "vessels": {"none": 7, "few": 2, "many": 1},
        "centre": {"plain": 7, "sore": 1, "crust": 1, "scar": 1},
    },
    "nevus": {
        "symmetry": {"symmetric": 7, "slightly asymmetric": 3},
        "border": {"smooth": 7, "uneven": 3},
        "edge": {"sharp": 5, "soft": 4, "blurry": 1},
        "size": {"small": 6, "medium": 3, "large": 1},
        "colour": {"light brown": 5, "dark brown": 4, "pink": 1},
        "patch_count": {0: 6, 1: 3, 2: 1},
        "patch_colours": {"light brown": 4, "dark brown": 4, "pink": 1},
        "dots": {"none": 6, "few": 4},
        "dot_colour": {"brown": 9, "black": 1},
        "streaks": {"none": 9, "few": 1},
        "veil": {"none": 9, "present": 1},
        "network": {"none": 4, "present": 6},
        "surface": {"smooth": 8, "rough": 1, "shiny": 1},
        "vessels": {"none": 9, "few": 1},
        "centre": {"plain": 9, "crust": 1},
    },
    "basal cell carcinoma": {
        "symmetry": {"symmetric": 3, "slightly asymmetric": 5, "asymmetric": 2},
        "border": {"smooth": 4, "uneven": 5, "jagged": 1},
        "edge": {"sharp": 4, "soft": 4, "blurry": 2},
        "size": {"small": 4, "medium": 4, "large": 2},
        "colour": {"pink": 5, "red": 3, "white": 1, "light brown": 1},
        "patch_count": {0: 4, 1: 4, 2: 2},
        "patch_colours": {"red": 3, "white": 3, "blue-grey": 3, "yellow": 1},
        "dots": {"none": 6, "few": 4},
        "dot_colour": {"blue-grey": 8, "brown": 2},
        "streaks": {"none": 9, "few": 1},
        "veil": {"none": 9, "present": 1},
        "network": {"none": 1},
        "surface": {"smooth": 3, "rough": 1, "shiny": 6},
        "vessels": {"none": 2, "few": 3, "many": 5},
        "centre": {"plain": 4, "sore": 4, "crust": 1, "scar": 1},
    },
    "seborrheic keratosis": {
        "symmetry": {"symmetric": 4, "slightly asymmetric": 4, "asymmetric": 2},
        "border": {"smooth": 3, "uneven": 5, "jagged": 2},
        "edge": {"sharp": 7, "soft": 2, "blurry": 1},
        "size": {"small": 2, "medium": 4, "large": 4},
        "colour": {"dark brown": 3, "light brown": 3, "black": 2, "yellow": 2},
        "patch_count": {0: 4, 1: 4, 2: 2},
        "patch_colours": {"yellow": 4, "light brown": 3, "dark brown": 2, "white": 1},
        "dots": {"none": 2, "few": 3, "many": 5},
        "dot_colour": {"white": 6, "black": 3, "brown": 1},
        "streaks": {"none": 1},
        "veil": {"none": 1},
        "network": {"none": 8, "present": 2},
        "surface": {"smooth": 1, "rough": 8, "shiny": 1},
        "vessels": {"none": 8, "few": 2},
        "centre": {"plain": 5, "crust": 4, "scar": 1},
    },
}


class Picture(NamedTuple):
    """One image of the benchmark, with the lesion it was drawn from."""

    pixels: np.ndarray  # uint8 [SIZE, SIZE, 3]
    class_name: str
    split: str
    patient: str
    lesion: Lesion


def distribution(name: str) -> Distribution:
    """A class's distribution over attributes: its typical one, mixed with the broad one."""
    mixed: dict[str, dict[str | int, float]] = {}
    for attribute, broad in BROAD.items():
        typical = TYPICAL[name][attribute]
        levels = {**broad, **typical}
        mixed[attribute] = {
            level: (1 - OVERLAP) * typical.get(level, 0) / sum(typical.values())
            + OVERLAP * broad.get(level, 0) / sum(broad.values())
            for level in levels
        }
    return mixed


def pictures(split: str, seed: int = 0) -> Iterator[Picture]:
    """All images of a split, class by class; the same ones for the same seed."""
    for name in CLASSES:
        weights = distribution(name)
        for patient in range(IMAGES[split] // IMAGES_PER_PATIENT):
            rng = generator("benchmark", seed, split, name, patient)
            scene = Scene.sample(rng)
            for _ in range(IMAGES_PER_PATIENT):
                lesion = sample(weights, rng)
                yield Picture(draw(lesion, scene, rng), name, split, f"{split} {name} {patient}", lesion)


def write_images(out: Path, seed: int = 0) -> Path:
    """Draw the benchmark into PNG files under `out`; returns their manifest (path, label, split, patient)."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split", "patient"))
        for split in IMAGES:
            for number, picture in enumerate(pictures(split, seed)):
                path = f"{split}_{number:04d}.png"
                Image.fromarray(picture.pixels).save(out / path)
                writer.writerow((path, picture.class_name, split, picture.patient))
    return manifest


def make_dataset(out: Path, seed: int = 0) -> None:
    """Draw the benchmark and write it as a prepared dataset at `out`, which it replaces."""
    import tempfile

    from vipbench.harness.data.importers.csv import read as read_manifest
    from vipbench.harness.data.shards import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        manifest = write_images(Path(folder), seed)
        source = read_manifest(manifest, classes=list(CLASSES))
        write_dataset(source, out, name="drawn lesions", modality="drawn dermoscopy", overwrite=True)
