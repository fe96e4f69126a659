"""A Slurm job: start a unit, with torchrun for several processes, and go back into the queue when its time ends.

The run, not this process, goes on from where it was: it writes a checkpoint when it is asked to end.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import submitit
from submitit.helpers import DelayedSubmission

from vipbench.harness.errors import UserError
from vipbench.harness.runs.directory import is_finished
from vipbench.sweeps.executors.processes import threads_each
from vipbench.sweeps.executors.submissions import slurm
from vipbench.sweeps.units import RUNS, STOPPED, Unit, record_end

SECONDS_BETWEEN_LOOKS = 0.5
REQUEUE = signal.SIGUSR2  # submitit has Slurm send it before the end
ASKS = (signal.SIGTERM, signal.SIGUSR1, REQUEUE)
RESTARTS = "SLURM_RESTART_COUNT"  # not set at the first start
FIRST_PORT, PORTS = 20000, 10000


@dataclass
class SlurmJob:
    """A unit of the sweep at `out`, as submitit calls it on each node of an allocation.

    Args:
        out: None for a command that belongs to no sweep.
        processes: on each node.
    """

    unit: Unit
    out: Path | None
    nodes: int
    processes: int

    def __call__(self) -> None:
        """Run the unit; record what failed. Leaves with the command's status, for Slurm to record too."""
        asked: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            asked.append(number)

        requeue = signal.getsignal(REQUEUE)  # submitit's
        assert callable(requeue)
        for number in ASKS:
            signal.signal(number, note)
        node = submitit.JobEnvironment().node
        log = self.unit.log.with_suffix(f".node{node}.log") if node else self.unit.log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab" if os.environ.get(RESTARTS) else "wb") as file:
            process = self._start(file.fileno())
        passed_on = False
        while process.poll() is None:
            passed_on = passed_on or bool(asked and self._ask_to_end(process))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        status = process.returncode
        if self._done(status) or (node and status == 0):
            return
        if (asked or status in STOPPED) and _still_wanted():
            try:
                requeue(REQUEUE, None)  # leaves this process; but not on further nodes, where there is nothing to do
            except submitit.core.utils.UncompletedJobError as error:
                self._record(status, f"{error} What it has a checkpoint of is not lost: `vipbench sweep retry`")
                raise SystemExit(1) from None
            return
        if not asked and node == 0:
            self._record(status)
        raise SystemExit(status if status > 0 else 1)

    def checkpoint(self) -> DelayedSubmission:
        """Have the same done when the job starts again; submitit calls this to requeue it."""
        return DelayedSubmission(self)

    def _start(self, log: int) -> "subprocess.Popen[bytes]":
        processes = {"OMP_NUM_THREADS": str(threads_each(self.processes))}
        return subprocess.Popen(
            self._command(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**processes, **os.environ},
            # Slurm may send it to all processes of a job; this one passes it on to those of the run.
            preexec_fn=lambda: signal.signal(REQUEUE, signal.SIG_IGN),
        )

    def _command(self) -> list[str]:
        python, *rest = self.unit.command
        if self.nodes * self.processes == 1:
            return [python, *rest]
        return [*self._launcher(python), "--nproc-per-node", str(self.processes), *rest]

    def _launcher(self, python: str) -> list[str]:
        launcher = [python, "-m", "torch.distributed.run"]
        if self.nodes == 1:
            return [*launcher, "--standalone"]
        environment = submitit.JobEnvironment()
        number = int(environment.raw_job_id)
        place = f"{environment.hostnames[0]}:{FIRST_PORT + number % PORTS}"
        start = os.environ.get(RESTARTS, "0")
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", f"{number}-{start}"]
        return [*launcher, "--nnodes", str(self.nodes), *rendezvous]

    def _ask_to_end(self, process: "subprocess.Popen[bytes]") -> bool:
        """Signal the processes of the run, past torchrun, which would die of it; returns whether there are any yet.

        Any command but a run ends at once: its results so far are kept anyway.
        """
        number = signal.SIGUSR1 if self.unit.names else signal.SIGTERM
        started = psutil.Process(process.pid)
        receivers = started.children() if self.nodes * self.processes > 1 else [started]
        for receiver in receivers:
            with contextlib.suppress(psutil.NoSuchProcess):
                receiver.send_signal(number)
        return bool(receivers)

    def _done(self, status: int) -> bool:
        if self.out and self.unit.names:
            return all(is_finished(self.out / RUNS / name) for name in self.unit.names)
        return status == 0

    def _record(self, status: int, reason: str | None = None) -> None:
        if self.out:
            record_end(self.out, self.unit, status, reason)


def _still_wanted() -> bool:
    """Check that this job still counts as running: nobody cancelled it, and Slurm does not requeue it itself."""
    try:
        state = slurm("squeue", "--noheader", f"--jobs={submitit.JobEnvironment().job_id}", "--format=%T").strip()
    except UserError as error:
        print(f"not requeued: {error}", file=sys.stderr, flush=True)
        return False
    return state == "RUNNING"
