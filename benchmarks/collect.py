"""Collecting a large sweep: 10,000 finished run directories, simulated, are checked and become one table.

    python -m benchmarks collect

Counted are the files that a table opens, which is the load on a shared file system, and the seconds on a local disk.
"""

import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import Result
from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.evaluation.metrics import compute_metrics
from vipbench.harness.report.tables import load_runs, make_table
from vipbench.harness.runs.directory import ALWAYS, CONFIG, FILES, METRICS, PREDICTIONS, PROVENANCE
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import digest_file, write_json
from vipbench.sweeps.status import sweep_status

RUNS = 10_000
CLASSES = [f"class {number}" for number in range(10)]
METHODS, SHOTS, RATES = ["vip", "coop", "cocoop", "zero_shot"], [1, 2, 4, 8, 16], [0.001, 0.002, 0.005, 0.01, 0.02]


def simulate(folder: Path) -> int:
    """Write run directories as runs leave them, but for what was learned; returns how many."""
    numbers = np.random.default_rng(0)
    labels = np.arange(200) % len(CLASSES)
    logits = [numbers.normal(size=(len(labels), len(CLASSES))).astype(np.float32) for _ in range(50)]
    metrics = [compute_metrics(labels, values, CLASSES) for values in logits]
    names = [f"image {number}" for number in range(len(labels))]
    frames = [pd.DataFrame({"id": names, "label": labels, "logits": list(values)}) for values in logits]
    predictions = [frame.to_parquet(index=False) for frame in frames]
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
        kind = numbers.integers(len(metrics))
        (run / CONFIG).write_text(config.to_yaml())
        (run / METRICS).write_text(json.dumps(metrics[kind]))
        (run / PROVENANCE).write_text(json.dumps({"dataset": "benchmark", "digests": digests._asdict()}))
        (run / PREDICTIONS).write_bytes(predictions[kind])
        (run / FILES).write_text(json.dumps({name: digest_file(run / name) for name in ALWAYS}))
    return len(os.listdir(folder))


def measure() -> Result:
    """Seconds of `vipbench sweep status`, of reading all runs, and of making the table."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        count = simulate(out / "runs")
        write_json(out / "sweep.json", {"runs": os.listdir(out / "runs")})
        began = time.perf_counter()
        assert {state.state for state in sweep_status(out)} == {"done"}
        status_seconds = time.perf_counter() - began
        began = time.perf_counter()
        runs = load_runs(out)
        read = time.perf_counter()
        table = make_table(runs, ["method"], ["shots", "train.lr"], ["accuracy"])
        seconds = time.perf_counter() - read
    row = {
        "runs": count,
        "files_opened": (len(ALWAYS) + 1) * count,
        "status_s": status_seconds,
        "read_s": read - began,
        "table_s": seconds,
        "cells": len(table.cells),
        "target_s": 10,
    }
    return Result("Run directories into one table", [row], [])
