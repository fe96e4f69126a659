"""Submit one command of `vipbench` as a Slurm job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def submit_command(
    command: Sequence[str], folder: Path, log: Path, profile: Path | None, options: dict[str, Any]
) -> str:
    """Submit a command that takes --gpus, as one process on one node; returns Slurm's number.

    Args:
        folder: records the job.
        log: the file for the command's output.
        profile: settings of the job in YAML, which `options` override.

    Raises:
        UserError: the settings are wrong, or Slurm refuses.
    """
    from vipbench.sweeps.executors.profile import Profile  # submitit takes long to import
    from vipbench.sweeps.executors.slurm import submit
    from vipbench.sweeps.units import Unit

    settings = Profile.load(profile, options | {"nodes_per_run": 1, "processes_per_run": 1})
    gpus = ["--gpus", str(settings.gpus_per_run)] if settings.gpus_per_run else []
    return submit(folder, [Unit((), (*command, *gpus), log)], settings)
