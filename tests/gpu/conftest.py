"""Record the outcomes of tests on a GPU as JSON, with the device's name, in the file that GPU_CHECK_JSON names."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import context
from vipbench.harness.system.files import write_json

FOUND: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what is known so far, in case what comes is ended from outside."""
    path = os.environ.get("GPU_CHECK_JSON")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    reason = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
    if isinstance(report.longrepr, tuple):  # of a skipped test
        reason = [report.longrepr[2]]
    measured = dict(report.user_properties)
    FOUND[report.nodeid] = {"outcome": report.outcome, "seconds": report.duration, **measured}
    FOUND[report.nodeid] |= {"reason": reason[0]} if reason else {}
    write_json(Path(path), {"context": context(), "tests": FOUND})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Have processes that run side by side not take each other's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpu_config(base_config: dict[str, Any]) -> dict[str, Any]:
    """A config of a run of a second on the GPU."""
    train = {**base_config["train"], "warmup_epochs": 0}
    return {**base_config, "train": train, "run": {**base_config["run"], "device": "cuda"}}
