"""What was submitted to Slurm, as files under a sweep's jobs/, and what Slurm (squeue, sacct where it works) says of it.

A record is written before sbatch is called, under a job name that nothing else has; so a submitter that dies in between is no
riddle, since the job is found by its name.
"""

import logging
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.config.validation import Section
from harness.errors import UserError
from harness.system.files import read_json, write_json
from sweeps.grid import validated

log = logging.getLogger(__name__)

JOBS = "jobs"
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

    name: str
    time: float
    units: tuple[tuple[str, ...], ...]
    job: str | None = None
    cancelled: bool = False

    def write(self, folder: Path) -> None:
        write_json(folder / f"{self.name}.json", self.model_dump(mode="json"))


class Entry(NamedTuple):
    """What Slurm says of a job: its number, its state ("" when it no longer knows), and why it waits."""

    job: str
    state: str
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.state in WAITING + WORKING


def submissions(folder: Path) -> list[Submission]:
    """All that was submitted from a folder, the oldest first. Raises UserError where a record is damaged."""
    read = [validated(Submission, read_json(path), str(path)) for path in folder.glob("*.json")]
    return sorted(read, key=lambda submission: submission.time)


def entries(folder: Path) -> dict[str, Entry]:
    """What Slurm says of the newest job of each run that was submitted.

    Raises:
        UserError: Slurm does not answer.
    """
    submitted = submissions(folder)
    known = ask_slurm(submitted) if submitted else {}
    found: dict[str, Entry] = {}
    for submission in submitted:
        for index, names in enumerate(submission.units):
            entry = known.get((submission.name, index), Entry(submission.job or "", ""))
            if not entry.state and submission.cancelled:
                entry = entry._replace(state="CANCELLED")
            found |= dict.fromkeys(names, entry)
    return found


def ask_slurm(submitted: Sequence[Submission]) -> dict[tuple[str, int], Entry]:
    """What Slurm says of submissions, by name and index of the array's task. Ended jobs it may no longer know.

    Raises:
        UserError: squeue is missing or does not answer.
    """
    names = ",".join(submission.name for submission in submitted)
    said = slurm("squeue", "--noheader", "--array", "--states=all", f"--name={names}", "--format=%j|%i|%T|%r")
    known = _read(said.splitlines())
    numbers = [s.job for s in submitted if s.job and any((s.name, i) not in known for i in range(len(s.units)))]
    if numbers and shutil.which("sacct"):
        try:
            columns = "--format=JobName%80,JobID,State"
            told = slurm("sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={','.join(numbers)}")
        except UserError as error:
            log.debug("no accounting: %s", error)  # a cluster without it is nothing unusual
        else:
            known = _read(told.splitlines()) | known
    return known


def _read(lines: Iterable[str]) -> dict[tuple[str, int], Entry]:
    found = {}
    for line in lines:
        name, job, state, *reason = line.split("|")
        _, _, index = job.partition("_")
        if index.isdecimal() or not index:  # else a range of tasks that have not started, from sacct
            found[name, int(index or 0)] = Entry(job, state.split(" ")[0], reason[0] if reason else "")
    return found


def cancel(folder: Path) -> int:
    """Take all that was submitted from a folder out of the queue, and end what runs; returns how many jobs that were.

    Raises:
        UserError: Slurm does not answer.
    """
    submitted = submissions(folder)
    active = {key: entry for key, entry in (ask_slurm(submitted) if submitted else {}).items() if entry.active}
    for submission in submitted:
        jobs = [entry.job for (name, _), entry in active.items() if name == submission.name]
        if jobs:
            submission.model_copy(update={"cancelled": True}).write(folder)
            slurm("scancel", f"--name={submission.name}")
    return len(active)


def slurm(*command: str) -> str:
    """What one of Slurm's commands prints.

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
