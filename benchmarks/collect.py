"""Collecting a large sweep: 10,000 finished run directories, simulated, become one table.

    python -m benchmarks collect

Counted are the files that a table opens, which is what a shared file system feels, and the seconds on a local disk.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Result
from harness.config.identity import Digests, run_name
from harness.evaluation.metrics import compute_metrics
from harness.report.tables import load_runs, make_table
from harness.runs.resolve import resolve_config
from harness.system.files import write_json, write_text

RUNS = 10_000
CLASSES = [f"class {number}" for number in range(10)]
METHODS, SHOTS, RATES = ["vip", "coop", "cocoop", "zero_shot"], [1, 2, 4, 8, 16], [0.001, 0.002, 0.005, 0.01, 0.02]


def simulate(folder: Path) -> int:
    """Write run directories as runs leave them, as far as a table reads them; returns how many."""
    numbers = np.random.default_rng(0)
    labels = np.arange(200) % len(CLASSES)
    metrics = [
        compute_metrics(labels, numbers.normal(size=(len(labels), len(CLASSES))).astype(np.float32), CLASSES)
        for _ in range(50)
    ]
    digests = Digests("0" * 64, "1" * 64, "2" * 64)
    for method, shots, lr, seed in itertools.product(METHODS, SHOTS, RATES, range(RUNS // 100)):
        mapping: dict[str, Any] = {
            "data": {"path": "data/benchmark", "shots": shots, "split_seed": seed},
            "symptoms": "symptoms.json",
            "method": {"name": method},
            "train": {"lr": lr},
            "seed": seed,
        }
        if method == "zero_shot":  # pins its seed and shots; a field of its own keeps the runs apart
            mapping |= {"train": None, "method": {"name": method, "templates": [f"{lr} {seed} {shots} {{}}"]}}
        config = resolve_config(mapping)
        run = folder / run_name(config, digests)
        run.mkdir(parents=True)
        write_text(run / "config.yaml", config.to_yaml())
        write_json(run / "metrics.json", metrics[numbers.integers(len(metrics))])
        write_json(run / "provenance.json", {"dataset": "benchmark", "digests": digests._asdict(), "versions": {}})
    return len(os.listdir(folder))


def measure() -> Result:
    """Seconds to read all runs and to make the table."""
    with tempfile.TemporaryDirectory() as name:
        count = simulate(Path(name))
        began = time.perf_counter()
        runs = load_runs(Path(name))
        read = time.perf_counter()
        table = make_table(runs, ["method"], ["shots", "train.lr"], ["accuracy"])
        seconds = time.perf_counter() - read
    row = {
        "runs": count,
        "files_opened": 3 * count,
        "read_s": read - began,
        "table_s": seconds,
        "cells": len(table.cells),
        "target_s": 10,
    }
    return Result("Run directories into one table", [row], [])
