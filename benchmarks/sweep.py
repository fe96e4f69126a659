"""A whole sweep against the textbook path: 4 methods x 3 seeds, 20 epochs, a small set; filling the bank counts.

    python -m benchmarks sweep

ViT-B-16 with random weights, 2 classes: 16 training and 16 validation images per class, 100 test images, JPEGs of 600 x 450. All
methods keep the epoch of highest validation accuracy, so that they are compared by one rule, and all seeds see the same views
(`train.augmentation_seed: 0`). Ours is one command, from its start to the last run directory, image tower, bank, files and all.
The textbook path does the same work in one process that has the backbone loaded already and writes nothing.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks import textbook
from benchmarks.measure import Result
from benchmarks.training_step import BATCH, CLASSES, SYMPTOMS
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.importers import folder as folder_importer
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.files import write_json

METHODS = ("zero_shot", "coop", "cocoop", "vip")
SEEDS, EPOCHS, EPOCHS_MEASURED = 3, 20, 2
PER_CLASS = {"train": 16, "val": 16, "test": 50}


def make_dataset(folder: Path) -> Path:
    """Smooth random pictures as JPEGs, prepared; and a symptom set beside them."""
    numbers = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            target = folder / "images" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                coarse = numbers.integers(0, 256, (15, 20, 3), dtype=np.uint8)
                coarse[..., label] //= 2
                picture = Image.fromarray(coarse).resize((600, 450), Image.Resampling.BICUBIC)
                picture.save(target / f"{name}-{split}-{index}.jpg", quality=90)
    write_dataset(folder_importer.read(folder / "images", CLASSES), folder / "prepared", name="benchmark")
    classes = [
        {"name": name, "symptoms": [{"text": text} for text in texts]}
        for name, texts in zip(CLASSES, SYMPTOMS, strict=True)
    ]
    provenance = {"kind": "hand-written", "author": "benchmark", "created": "2026-01-01", "how": "for timing"}
    content = {"format": "vipbench-symptoms/1", "task": "benchmark", "modality": None, "classes": classes}
    write_json(folder / "symptoms.json", content | {"provenance": provenance})
    return folder / "prepared"


def write_grid(path: Path, data: Path, axes: dict[str, list[Any]], methods: Sequence[str], epochs: int) -> Path:
    """A grid of all methods over the axes."""
    base = {
        "data": {"path": str(data)},
        "backbone": "ViT-B-16",
        "symptoms": str(data.with_name("symptoms.json")),
        "train": {"epochs": epochs, "select": "best", "augmentation_seed": 0},
        "run": {"workers": 0},
    }
    adjust = [
        {"where": {"method": name}, "set": {"train.batch_size": BATCH[name]}} for name in methods if name in BATCH
    ]
    path.write_text(yaml.safe_dump({"base": base, "axes": {"method": list(methods), **axes}, "adjust": adjust}))
    return path


def timed_sweep(grid: Path, out: Path, options: Sequence[str]) -> float:
    """Seconds of `vipbench sweep run`, as a user would start it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "vipbench", "sweep", "run", str(grid), "--out", str(out), *options]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def measure() -> Result:
    """Seconds of the whole sweep on both paths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_dataset(folder / "data")
        grid = write_grid(folder / "grid.yaml", data, {"seed": list(range(1, SEEDS + 1))}, METHODS, EPOCHS)
        ours = timed_sweep(grid, folder / "out", ["--pack"])
        runs = len(read_runs(folder / "out" / "runs"))
        plain = {name: _plain_seconds(name, data) for name in METHODS}
    rows = [
        {"method": name, "plain_s": SEEDS * seconds, "ours_s": None, "ratio": None} for name, seconds in plain.items()
    ]
    total = SEEDS * sum(plain.values())
    rows.append({"method": "all", "plain_s": total, "ours_s": ours, "ratio": total / ours})
    notes = [
        f"textbook path: {EPOCHS_MEASURED} of {EPOCHS} epochs of one of {SEEDS} seeds were measured, and counted as often as "
        "the sweep has them: every epoch and seed is the same work",
        f"ours: {runs} different runs, since zero-shot is the same for every seed; the textbook path tests it {SEEDS} times",
    ]
    return Result(f"A sweep of {len(METHODS)} methods x {SEEDS} seeds, {EPOCHS} epochs (ViT-B-16)", rows, notes)


def _plain_seconds(name: str, data: Path) -> float:
    """Seconds that one run of a method takes on the textbook path."""
    torch.manual_seed(0)
    device = choose_device("auto").type  # where our sweep ran
    backbone, cls = load_backbone(BackboneConfig(name="ViT-B-16"), device), method_class(name)
    method = cls(cls.Config(name=name), Task(CLASSES, SYMPTOMS), backbone).to(device).train()
    logits, dataset = textbook.plain_logits(method, backbone), Dataset(data)
    files = {
        split: [(samples.image_bytes(place), int(samples.labels[place])) for place in range(len(samples))]
        for split in PER_CLASS
        for samples in [dataset.split(split)]
    }
    batch, epoch_seconds = BATCH.get(name, 32), 0.0
    if method.trains:
        optimizer = torch.optim.SGD(list(method.trainable().values()), 0.002, momentum=0.9, weight_decay=5e-4)
        began = time.perf_counter()
        for _ in range(EPOCHS_MEASURED):
            textbook.train_epoch(logits, optimizer, files["train"], backbone, batch)
            textbook.test(logits, files["val"], backbone, batch)
        epoch_seconds = (time.perf_counter() - began) / EPOCHS_MEASURED
    began = time.perf_counter()
    textbook.test(logits, files["test"], backbone, batch)
    return epoch_seconds * EPOCHS + time.perf_counter() - began
