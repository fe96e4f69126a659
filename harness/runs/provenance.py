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
        if dataset.info.ordinal:
            self.add(ordinal=True)

    def add(self, **facts: Any) -> None:
        self.facts |= facts

    def describe(self) -> dict[str, Any]:
        """All facts so far, with versions, hardware and times; all ranks call it together."""
        return {
            **self.facts,
            "result_version": RESULT_VERSION,
            "versions": versions(),
            "git": git_commit(Path(__file__)),
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


def git_commit(file: Path) -> str | None:
    """The commit of the repository that tracks a file, with "+changes" when its work tree differs; None where none does."""
    file = file.resolve()

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # else the package lies in a project that is not its own
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, not tracked, no commit yet: there is nothing to record
        return None


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
