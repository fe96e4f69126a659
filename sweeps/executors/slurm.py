"""The executor `slurm`: units as job arrays of a cluster, through submitit.

    vipbench sweep run GRID --out DIR --executor slurm --partition gpu --time 4:00:00 --max-parallel 64

It returns once the jobs are in the queue, which go on by themselves. The folder of the sweep and all that its configs name have
to be on a file system that the nodes see.
"""

import contextlib
import io
import re
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_yaml
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.executors.profile import Profile
from vipbench.sweeps.executors.slurm_job import SlurmJob
from vipbench.sweeps.executors.submissions import Submission, slurm
from vipbench.sweeps.units import CONFIGS, FAILED, JOBS, LOGS, Unit

BANK_COMMAND = (sys.executable, "-m", "vipbench", "bank", "build")


class SlurmExecutor(Executor):
    """Units as job arrays of a Slurm cluster."""

    kind: Literal["slurm"] = "slurm"
    profile: Profile

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Submit units, and before them a job that fills the bank they share.

        Raises:
            UserError: Slurm refuses, or runs that train together are to have several processes.
        """
        if (
            any(len(unit.names) > 1 for unit in units)
            and self.profile.processes_per_node * self.profile.nodes_per_run > 1
        ):
            raise UserError("--pack trains runs together in one process; give --gpus-per-run 1, or leave --pack out")
        after = None
        bank = bank_unit(out, units)
        if bank:
            after = submit(out / JOBS, [bank], self.profile, out=out)
        most = _largest_array()
        for first in range(0, len(units), most):
            part = units[first : first + most]
            job = submit(out / JOBS, part, self.profile, out=out, after=after)
            after = job if self.profile.max_parallel else after  # a throttle counts within one array only
            for name in (name for unit in part for name in unit.names):
                (out / FAILED / f"{name}.json").unlink(missing_ok=True)


def bank_unit(out: Path, units: Sequence[Unit]) -> Unit | None:
    """The job that computes the image features of several units, where their configs have a bank."""
    files = [out / CONFIGS / f"{name}.yaml" for unit in units for name in unit.names]
    files = [file for file in files if read_yaml(file)["run"]["bank"]]
    if len(units) < 2 or not files:
        return None
    return Unit((), (*BANK_COMMAND, *map(str, files)), out / LOGS / "bank.log")


def submit(
    folder: Path, units: Sequence[Unit], profile: Profile, out: Path | None = None, after: str | None = None
) -> str:
    """Submit units as one job array, and record it in a folder; returns Slurm's number.

    Args:
        out: the sweep they belong to.
        after: the number of a job that has to end first, in whatever way.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError("sbatch, srun: no such commands here; --executor slurm works on a machine of a Slurm cluster")
    label = units[0].log.stem if len(units) == 1 else "sweep"
    name = f"vipbench-{re.sub(r'[^A-Za-z0-9_.-]', '_', label)[:40]}-{secrets.token_hex(4)}"
    submission = Submission(name=name, time=time.time(), units=tuple(unit.names for unit in units))
    submission.write(folder)
    jobs = [SlurmJob(unit, out, profile.nodes_per_run, profile.processes_per_node) for unit in units]
    executor = submitit.SlurmExecutor(folder / name, max_num_timeout=profile.max_requeues)
    executor.update_parameters(
        **profile.sbatch(),
        job_name=name,
        array_parallelism=profile.max_parallel or len(units),
        **({"dependency": f"afterany:{after}"} if after else {}),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a line that names the job
            submitted = executor.submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        (folder / f"{name}.json").unlink()
        raise UserError(f"sbatch: {' '.join(str(error).split())}") from error
    job = submitted[0].job_id.partition("_")[0]
    submission.model_copy(update={"job": job}).write(folder)
    return job


def _largest_array() -> int:
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(match.group(1)) - 1) if match else 1000
