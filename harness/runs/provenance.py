"""Provenance of a result: versions, commit, digests, hardware and times."""

import importlib.metadata
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vipbench.harness import __version__
from vipbench.harness.config.identity import RESULT_VERSION, Digests
from vipbench.harness.data.reader import Dataset
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.system.processes import available_cores

PACKAGES = ("torch", "torchvision", "open_clip_torch", "accelerate", "transformers", "numpy", "pillow", "webdataset")


class Provenance:
    """Collect the contents of a run's provenance.json from its start on."""

    def __init__(self, dataset: Dataset, digests: Digests, topology: Topology) -> None:
        self.started, self.clock = datetime.now(UTC), time.monotonic()
        self.topology = topology
        self.facts: dict[str, Any] = {
            "dataset": dataset.info.name,
            "classes": dataset.classes,
            "digests": digests.to_mapping(),
        }

    def add(self, **facts: Any) -> None:
        self.facts |= facts

    def describe(self) -> dict[str, Any]:
        """All facts so far, with versions, hardware and times; all ranks call it together."""
        return {
            **self.facts,
            "result_version": RESULT_VERSION,
            "versions": versions(),
            "git": git_commit(Path(__file__).parent),
            "hardware": {**self.topology.describe(), **machine()},
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.clock, 1),
        }


def versions() -> dict[str, str]:
    """Versions of Python, vipbench and the packages that results depend on."""
    return {
        "python": platform.python_version(),
        "vipbench": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out around a folder, with "+changes" when the work tree differs; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, no commit yet: there is nothing to record
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """The processor's name and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return {"cpu": name, "cores": available_cores()}
