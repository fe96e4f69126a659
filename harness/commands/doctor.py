"""The doctor verb: the parts of this machine that runs, sweeps and LLM servers need, and what would not work here."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from vipbench.harness.errors import UserError

SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "fuse.glusterfs", "fuse.sshfs"}
LEAST_FREE_GIB = 5  # on the disk of a sweep
LEAST_SHARED_MEMORY_GIB = 1  # in which image loading processes hand over their batches
GIB = 2**30


class Finding(NamedTuple):
    """A part of the machine, as it was found; `missing` is what does not work because of it, "" where all does."""

    part: str
    found: str
    missing: str = ""


def doctor(
    folder: Annotated[Path, typer.Argument(help="where results will be written")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Print what this machine has (GPUs, disk, Slurm, vLLM), and what would not work here."""
    findings = list(examine(folder))
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2, ensure_ascii=False))
        return
    for part, found, _ in findings:
        typer.echo(f"{part + ':':<15}{found}")
    problems = [finding for finding in findings if finding.missing]
    typer.echo("would not work here:" if problems else "everything would work here")
    for part, _, missing in problems:
        typer.echo(f"  {part}: {missing}")


def examine(folder: Path) -> Iterator[Finding]:
    """Look at the parts of this machine, one after the other. Raises UserError where `folder` is no folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    yield Finding(
        "vipbench", f"{metadata.version('vipbench')}, Python {platform.python_version()}, {platform.system()}"
    )
    yield from _processors()
    yield _disk(folder)
    yield _shared_memory()
    yield _slurm()
    yield _vllm()


def _processors() -> Iterator[Finding]:
    import psutil
    import torch

    from vipbench.harness.system.processes import available_cores

    memory = psutil.virtual_memory()
    yield Finding(
        "CPU",
        f"{available_cores()} cores, {memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB memory available",
    )
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", f"{torch.__version__}, {built}")
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards)
    missing = "run.device=cuda, precision=fp16 and precision=tf32 are refused; towers the size of ViT-B/16 and larger are slow"
    yield Finding("GPUs", names or "none", "" if cards else missing)


def _disk(folder: Path) -> Finding:
    import psutil

    path = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
    free = shutil.disk_usage(path).free / GIB
    where = f"{kind}, {'shared between machines' if kind in SHARED else 'of this machine'}"
    problems = []
    if not os.access(path, os.W_OK):
        problems.append(f"{path} is read-only, so no run can be written there")
    if free < LEAST_FREE_GIB:
        problems.append(f"{free:.1f} GiB are free; stored image features and checkpoints may need {LEAST_FREE_GIB}")
    return Finding("disk", f"{path}: {free:,.0f} GiB free ({where})", "; ".join(problems))


def _shared_memory() -> Finding:
    path = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    total = shutil.disk_usage(path).total / GIB
    missing = "image loading processes may run out of it; use run.workers=0" if total < LEAST_SHARED_MEMORY_GIB else ""
    return Finding("shared memory", f"{path}: {total:.1f} GiB", missing)


def _slurm() -> Finding:
    absent = [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]
    if absent:
        return Finding("Slurm", "none", f"--executor slurm is refused, since there is no {', '.join(absent)}")
    return Finding("Slurm", f"sbatch at {shutil.which('sbatch')}")


def _vllm() -> Finding:
    from vipbench.harness.symptoms.llm.server import interpreter

    try:
        return Finding("vLLM", f"in the environment of {interpreter()}")
    except UserError as error:
        return Finding("vLLM", "none", f"--serve and `vipbench serve`: {error}")
