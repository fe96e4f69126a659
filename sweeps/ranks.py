"""The executor `torchrun`: units dealt over the processes of one allocation. Each takes the next that nobody has, on its GPU.

    vipbench sweep run GRID --out DIR --executor torchrun --nproc-per-node 8 --nnodes 2 --rdzv-endpoint FIRST_NODE:29500

The same command on each node; DIR is on a file system that all of them see. It starts `torchrun -m sweeps.ranks DIR NAMES.json`.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from harness.errors import UserError, shortened
from harness.system.console import RUNNER
from harness.system.files import read_json
from harness.system.processes import end_with_parent
from sweeps.local import SECONDS_TO_STOP, start, stop, stop_signals_interrupt, threads
from sweeps.status import planned
from sweeps.units import Executor, Unit, record_end, unit

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger("sweeps.ranks")  # this module is __main__ under torchrun

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_TORCHRUN_TOO = ("TORCHELASTIC_", "GROUP_", "ROLE_")  # what begins like this
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_OF_SILENCE = 120.0  # after which the first process no longer waits for another one
NAMES, NEXT, ENDED = "names", "next", "ended"  # in the store that the processes share
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$", max_length=200)]
GROUPS = TypeAdapter(list[Annotated[tuple[Name, ...], Field(min_length=1)]])


class TorchrunExecutor(Executor):
    """Units dealt over the processes that torchrun starts, on one node or several.

    Attributes:
        rdzv_endpoint: HOST:PORT where the nodes find each other; None: there is one node.
    """

    kind: Literal["torchrun"] = "torchrun"
    rdzv_endpoint: str | None = None
    nnodes: PositiveInt = 1
    nproc_per_node: PositiveInt = 1

    @property
    def alone(self) -> bool:
        return self.nnodes == 1  # else each node gives the same command

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Work through units together with the other nodes.

        Raises:
            UserError: several nodes without an endpoint, or one of our own processes (not a run) was lost.
        """
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise UserError("--rdzv-endpoint: say where the nodes find each other: HOST:PORT, the host one of them")
        meeting = ["--standalone"]
        if self.rdzv_endpoint:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.rdzv_endpoint, "--rdzv-id", "sweep"]
            meeting += ["--nnodes", str(self.nnodes)]
        launcher = [sys.executable, "-m", "sweeps.launcher", *meeting, "--nproc-per-node", str(self.nproc_per_node)]
        environment = {"OMP_NUM_THREADS": str(threads(self.nproc_per_node)), **os.environ, RUNNER: str(os.getpid())}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, stop_signals_interrupt():
            json.dump([unit.names for unit in units], file)
            file.flush()
            command = [*launcher, "-m", "sweeps.ranks", str(out), file.name]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
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


def _pass_on(said: IO[bytes], asked: threading.Event) -> None:
    """Show what torchrun and its processes print, until we ask them to end: torchrun answers that with a traceback."""
    for line in said:
        if not asked.is_set():
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def deal(out: Path, groups: Sequence[Sequence[str]], store: "Store", rank: int, world: int) -> None:
    """Work through runs (those of a group train together), together with the other ranks. What counts is rank 0's list.

    Only names of runs go through the store, which anyone on the network can write to: each rank looks them up in the plan.
    """
    if rank == 0:
        store.set(NAMES, json.dumps(groups))
    units = [unit(out, names) for names in planned_groups(out, store.get(NAMES))]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_TORCHRUN and not name.startswith(OF_TORCHRUN_TOO)
    }
    gpu = _own_gpu()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with stop_signals_interrupt():
        while 0 <= (place := store.add(NEXT, 1) - 1) < len(units):
            task = units[place]
            log.info("process %d: %s", rank, task.names[0])
            record_end(out, task, _run(task, environment, store, rank))
    store.add(ENDED, 1)
    if rank == 0:
        _wait_for_the_others(store, world)


def planned_groups(out: Path, said: bytes) -> list[tuple[str, ...]]:
    """Groups of names that the store holds, each name in the plan of the sweep at `out`, and there once.

    Raises:
        UserError: it holds anything else.
    """
    try:
        groups = GROUPS.validate_json(said)
    except ValidationError as error:
        raise UserError(
            f"{out}: the processes' store holds something else than names of runs; nothing is run"
        ) from error
    names, known = [name for group in groups for name in group], set(planned(out))
    for name in names:
        if name not in known:
            raise UserError(f"{out}: the processes' store names a run that is not planned here: {shortened(name)}")
    if len(set(names)) < len(names):
        raise UserError(f"{out}: the processes' store names a run twice; nothing is run")
    return groups


def _run(unit: Unit, environment: dict[str, str], store: "Store", rank: int) -> int:
    """A unit's exit status; its processes have ended when this returns, for whatever reason. Tells the store that we live."""
    process, beat = start(unit, environment), 0.0
    try:
        while (status := process.poll()) is None:
            if time.monotonic() - beat > SECONDS_BETWEEN_BEATS:
                beat = time.monotonic()
                store.add(f"beat/{rank}", 1)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return status
    finally:
        stop([process])


def _wait_for_the_others(store: "Store", world: int) -> None:
    """Stay until all have ended: the store lives on the first node, and torchrun takes it away with us."""
    beats, heard = -1, time.monotonic()
    while store.add(ENDED, 0) < world:
        now = sum(store.add(f"beat/{rank}", 0) for rank in range(world)) + store.add(ENDED, 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        if time.monotonic() - heard > SECONDS_OF_SILENCE:
            log.warning("nothing was heard of the other processes for %.0f s: not waited for", SECONDS_OF_SILENCE)
            return
        time.sleep(1.0)


def _own_gpu() -> str | None:
    """This process's GPU among those of its node, as CUDA_VISIBLE_DEVICES names it; None where there is no GPU."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(place) for place in range(torch.cuda.device_count())]
    return visible[int(os.environ["LOCAL_RANK"]) % len(visible)] if visible else None


def main(out: Path, file: Path) -> None:
    """One process of torchrun's."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, port, world, hosts_it, timedelta(minutes=30))
    deal(out, read_json(file), store, rank, world)


if __name__ == "__main__":
    from harness.system.console import setup_logging, user_errors

    end_with_parent(by=signal.SIGTERM)
    setup_logging()
    with user_errors():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
