"""The executor `torchrun`: units shared by the processes of one allocation, each of which works on its own GPU.

    vipbench sweep run GRID --out DIR --executor torchrun --nproc-per-node 8 --nnodes 2 --rdzv-endpoint FIRST_NODE:29500

The same command on each node; DIR is on a file system that all of them see. torchrun starts the processes at one time and gives
them their numbers; which of them works on which run they settle by claims (sweeps/executors/claims.py).
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

from pydantic import PositiveInt

from vipbench.harness.errors import UserError
from vipbench.harness.system.console import RUNNER
from vipbench.harness.system.files import read_json
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.executors.claims import failure_times, work_through
from vipbench.sweeps.executors.processes import SECONDS_TO_STOP, start, stop, stop_signals_interrupt, threads_each
from vipbench.sweeps.units import Unit, unit

log = logging.getLogger(__name__)

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")  # of further variables that torchrun sets
MOST_RESTARTS = 3  # of the processes of a node of which one died


class TorchrunExecutor(Executor):
    """Units shared by the processes that torchrun starts, on one node or several.

    Attributes:
        rdzv_endpoint: HOST:PORT where the nodes find each other; None: there is one node.
    """

    kind: Literal["torchrun"] = "torchrun"
    rdzv_endpoint: str | None = None
    nnodes: PositiveInt = 1
    nproc_per_node: PositiveInt = 1

    @property
    def exclusive(self) -> bool:
        return self.nnodes == 1  # otherwise each node gives the same command

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Run units together with the other nodes.

        Raises:
            UserError: several nodes without an endpoint, or processes of ours (not runs) died again and again.
        """
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise UserError("--rdzv-endpoint: say where the nodes find each other: HOST:PORT, the host one of them")
        meeting = ["--standalone"]
        if self.rdzv_endpoint:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.rdzv_endpoint, "--rdzv-id", "sweep"]
            meeting += ["--nnodes", str(self.nnodes)]
        meeting += ["--nproc-per-node", str(self.nproc_per_node), "--max-restarts", str(MOST_RESTARTS)]
        environment = {"OMP_NUM_THREADS": str(threads_each(self.nproc_per_node)), **os.environ}
        # Every node gets here before any process starts: torchrun starts them together.
        failures = failure_times(out, [name for unit in units for name in unit.names])
        task = {"units": [unit.names for unit in units], "failures": failures}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, stop_signals_interrupt():
            json.dump(task, file)
            file.flush()
            worker = ["-m", f"{__package__}.worker", str(out), file.name]
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.launcher", *meeting, *worker],
                env={**environment, RUNNER: str(os.getpid())},
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            asked = threading.Event()
            threading.Thread(target=_pass_on, args=(process.stderr, asked), daemon=True).start()
            try:
                status = process.wait()
            except KeyboardInterrupt:
                asked.set()
                raise
            finally:
                stop([process], 3 * SECONDS_TO_STOP)  # its processes stop theirs first
        if status:
            raise UserError(f"torchrun ended with status {status}, see above; the same command runs what is missing")


def _pass_on(printed: IO[bytes], asked: threading.Event) -> None:
    """Show the output of torchrun and its processes, until we ask them to end: torchrun answers that with a traceback."""
    for line in printed:
        if not asked.is_set():
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def work(out: Path, task: Path) -> None:
    """Work through the units of a task file as one process of torchrun's, each unit on this process's GPU."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    content = read_json(task)
    units = [unit(out, names) for names in content["units"]]
    environment = _environment()

    def run(unit: Unit) -> int:
        log.info("process %d: %s", rank, unit.names[0])
        return _run(unit, environment)

    with stop_signals_interrupt():
        work_through(out, units, run, first=rank * len(units) // world, before=content["failures"])


def _environment() -> dict[str, str]:
    """This process's environment without the variables of torchrun, with its own one of the node's GPUs."""
    environment = {
        name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith(PREFIXES)
    }
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")  # one, without a name, where there is none
    return environment | {"CUDA_VISIBLE_DEVICES": gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]}


def _run(unit: Unit, environment: Mapping[str, str]) -> int:
    """Run a unit; returns its exit status. Its processes have ended when this returns for any reason."""
    process = start(unit, environment)
    try:
        return process.wait()
    finally:
        stop([process])
