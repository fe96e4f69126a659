"""The executor `torchrun`: units dealt over the processes of one allocation. Each takes the next that nobody has, on its GPU.

    vipbench sweep run GRID --out DIR --executor torchrun --nproc-per-node 8 --nnodes 2 --rdzv-endpoint FIRST_NODE:29500

The same command on each node; DIR is on a file system that all of them see. It starts `torchrun -m sweeps.ranks DIR UNITS.json`.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from harness.errors import UserError
from harness.files import read_json
from sweeps.local import SECONDS_TO_STOP, start, stop, stop_signals_interrupt, threads
from sweeps.units import Executor, Unit, record_end

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger("sweeps.ranks")  # this module is __main__ under torchrun

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_TORCHRUN_TOO = ("TORCHELASTIC_", "GROUP_", "ROLE_")  # what begins like this
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_OF_SILENCE = 120.0  # after which the first process no longer waits for another one
UNITS, NEXT, ENDED = "units", "next", "ended"  # in the store that the processes share


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
        launcher = [sys.executable, "-m", "torch.distributed.run", *meeting]
        environment = {"OMP_NUM_THREADS": str(threads(self.nproc_per_node)), **os.environ}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, stop_signals_interrupt():
            json.dump([asdict(unit) for unit in units], file, default=str)
            file.flush()
            command = [
                *launcher,
                "--nproc-per-node",
                str(self.nproc_per_node),
                "-m",
                "sweeps.ranks",
                str(out),
                file.name,
            ]
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                status = process.wait()
            finally:
                stop([process], 3 * SECONDS_TO_STOP)  # its processes stop theirs first
        if status:
            raise UserError(f"torchrun ended with status {status}, see above; the same command runs what is missing")


def deal(out: Path, units: Sequence[Unit], store: "Store", rank: int, world: int) -> None:
    """Work through units, together with the other ranks. What counts is rank 0's list."""
    if rank == 0:
        store.set(UNITS, json.dumps([asdict(unit) for unit in units], default=str))
    units = _read(json.loads(store.get(UNITS)))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_TORCHRUN and not name.startswith(OF_TORCHRUN_TOO)
    }
    gpu = _own_gpu()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with stop_signals_interrupt():
        while (place := store.add(NEXT, 1) - 1) < len(units):
            unit = units[place]
            log.info("process %d: %s", rank, unit.names[0])
            record_end(out, unit, _run(unit, environment, store, rank))
    store.add(ENDED, 1)
    if rank == 0:
        _wait_for_the_others(store, world)


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


def _read(units: list[dict[str, object]]) -> list[Unit]:
    return [Unit(tuple(unit["names"]), tuple(unit["command"]), Path(str(unit["log"]))) for unit in units]  # type: ignore[arg-type]


def main(out: Path, file: Path) -> None:
    """One process of torchrun's."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, port, world, hosts_it, timedelta(minutes=30))
    deal(out, _read(read_json(file)), store, rank, world)


if __name__ == "__main__":
    from harness.console import setup_logging

    setup_logging()
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
