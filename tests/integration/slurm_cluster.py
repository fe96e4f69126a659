"""A real Slurm cluster of our own with a temporary configuration: munged, slurmctld, and two slurmd that are two nodes.

Both nodes are this machine. The first has its name, under which the processes of a run look for each other.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
SECONDS_TO_START = 60.0
# A job that was requeued waits until its old credential has expired (cred_expire), by default two minutes.
CONFIGURATION = """
ClusterName=vipbench
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 CoresPerSocket=2 RealMemory=4000"


def missing() -> list[str]:
    """The programs that are not installed here (Debian's packages slurm-wlm and munge)."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def running_cluster() -> Iterator[Path]:
    """Start the daemons; yields the configuration, for SLURM_CONF. They and their files are gone at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vipbench-slurm-", dir="/tmp"))  # sockets have short names
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        configuration = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        nodes = (host, f"{host}-too")
        lines = [NODE.format(name=node, host=host, port=_free_port()) for node in nodes]
        settings = {"folder": folder, "host": host, "user": getpass.getuser(), "controller": _free_port()}
        configuration.write_text(CONFIGURATION.format(**settings, nodes="\n".join(lines)))
        for name in ("state", *(f"spool.{node}" for node in nodes)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{option}-file={folder}/munge.{option}" for option in ("key", "pid", "log", "seed")]
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D", "-i"],
            *(["slurmd", "-D", "-N", name] for name in nodes),
        ):
            with (folder / f"{command[0]}.out").open("ab") as out:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            stack.callback(_stop, process)
            if command[0] == "munged":
                _wait_for(folder, lambda: (folder / "munge.socket").exists())
        _wait_for(
            folder,
            lambda: (
                _said(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"], environment).split()
                == ["idle"] * 2
            ),
        )
        stack.callback(_cancel_all, environment)
        yield configuration


def _cancel_all(environment: dict[str, str]) -> None:
    subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, capture_output=True, check=False)
    deadline = time.monotonic() + 15
    while _said(["squeue", "--noheader", "--format=%i"], environment) and time.monotonic() < deadline:
        time.sleep(0.5)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(folder: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        if time.monotonic() > deadline:
            logs = [path for path in folder.iterdir() if path.suffix in (".out", ".log")]
            raise RuntimeError("\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs))
        time.sleep(0.1)


def _said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
