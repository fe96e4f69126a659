"""Submissions to Slurm, as files under a sweep's jobs/, and the states of their jobs from squeue and, where it works, sacct.

A record is written before sbatch is called, under a job name that nothing else has; so where a submitter dies in between, the job
is found by its name.
"""

import logging
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_json, write_json
from vipbench.sweeps.units import Name

log = logging.getLogger(__name__)

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")
SECONDS_FOR_SLURM = 60


class Submission(Section):
    """One call of sbatch.

    Attributes:
        name: of the Slurm job; nothing else has it.
        time: seconds since 1970.
        units: the names of the runs of each of its array's tasks.
        job: Slurm's number, once it is known.
        cancelled: whether we asked for its end.
    """

    name: Name
    time: float
    units: tuple[tuple[Name, ...], ...]
    job: str | None = None
    cancelled: bool = False

    def write(self, folder: Path) -> None:
        write_json(folder / f"{self.name}.json", self.model_dump(mode="json"))


class JobState(NamedTuple):
    """The state of a Slurm job: its number, Slurm's word for the state ("" once it is forgotten), and why it waits."""

    job: str
    state: str
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.state in WAITING + WORKING


def submissions(folder: Path) -> list[Submission]:
    """All that was submitted from a folder, the oldest first. Raises UserError where a record is damaged."""
    read = [validate(Submission, read_json(path), where=str(path)) for path in folder.glob("*.json")]
    return sorted(read, key=lambda submission: submission.time)


def job_states(folder: Path) -> dict[str, JobState]:
    """The state of the newest job of each run that was submitted.

    Raises:
        UserError: Slurm does not answer.
    """
    submitted = submissions(folder)
    known = _ask_slurm(submitted) if submitted else {}
    found: dict[str, JobState] = {}
    for submission in submitted:
        for index, names in enumerate(submission.units):
            state = known.get((submission.name, index), JobState(submission.job or "", ""))
            if not state.state and submission.cancelled:
                state = state._replace(state="CANCELLED")
            found |= dict.fromkeys(names, state)
    return found


def _ask_slurm(submitted: Sequence[Submission]) -> dict[tuple[str, int], JobState]:
    """States of jobs by the name of the submission and the index of the array's task; Slurm forgets those that ended.

    Raises:
        UserError: squeue is missing or does not answer.
    """
    names = ",".join(submission.name for submission in submitted)
    listed = slurm("squeue", "--noheader", "--array", "--states=all", f"--name={names}", "--format=%j|%i|%T|%r")
    known = _read(listed.splitlines())
    numbers = [s.job for s in submitted if s.job and any((s.name, i) not in known for i in range(len(s.units)))]
    if numbers and shutil.which("sacct"):
        try:
            columns = "--format=JobName%80,JobID,State"
            ended = slurm("sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={','.join(numbers)}")
        except UserError as error:
            log.debug("no accounting: %s", error)  # a cluster without it is nothing unusual
        else:
            known = _read(ended.splitlines()) | known
    return known


def _read(lines: Iterable[str]) -> dict[tuple[str, int], JobState]:
    found = {}
    for line in lines:
        name, job, state, *reason = line.split("|")
        _, _, index = job.partition("_")
        if index.isdecimal() or not index:  # else a range of tasks that have not started, from sacct
            found[name, int(index or 0)] = JobState(job, state.split(" ")[0], reason[0] if reason else "")
    return found


def cancel(folder: Path) -> int:
    """Take the jobs that were submitted from a folder out of the queue, and end those that run; returns their number.

    Raises:
        UserError: Slurm does not answer.
    """
    submitted = submissions(folder)
    active = {key: state for key, state in (_ask_slurm(submitted) if submitted else {}).items() if state.active}
    for submission in submitted:
        jobs = [state.job for (name, _), state in active.items() if name == submission.name]
        if jobs:
            submission.model_copy(update={"cancelled": True}).write(folder)
            slurm("scancel", f"--name={submission.name}")
    return len(active)


def slurm(*command: str) -> str:
    """Run one of Slurm's commands; returns its output.

    Raises:
        UserError: it is missing, fails or does not answer.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_SLURM, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: no such command here; use a machine of the Slurm cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: Slurm did not answer in {SECONDS_FOR_SLURM} s; try again") from error
    if result.returncode:
        raise UserError(f"{command[0]}: {' '.join(result.stderr.split()) or f'exit status {result.returncode}'}")
    return result.stdout
