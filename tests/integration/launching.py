"""Starts vipbench as a person would, with python, torchrun or accelerate launch, and compares the runs that come out.

Where the launcher is not what is tested, processes are forked from one that has imported torch, which saves seconds for each.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file

from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import load_config
from vipbench.harness.system.files import read_json

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "harness" / "launch"
SCRIPTS = Path(sys.executable).parent
RUN = [str(ROOT / "harness" / "run.py")]
PYTHON = [sys.executable]
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    """This process's, without what a launcher left in it."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    return {**kept, "OMP_NUM_THREADS": "1"}


def torchrun(processes: int) -> list[str]:
    return [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def accelerate(*options: str) -> list[str]:
    return [*PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0", *options]


def deepspeed(json: str, processes: int) -> list[str]:
    """`accelerate launch` with one of our DeepSpeed JSON files."""
    files = ["--config_file", str(LAUNCH / "deepspeed_8_gpus.yaml"), "--deepspeed_config_file", str(LAUNCH / json)]
    return accelerate(*files, "--num_processes", str(processes))


def launch(command: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with more environment variables."""
    env = {**environment(), **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def forked(work: Callable[..., None], *arguments: Any, rank: int = 0, world: int = 1, port: int = 0) -> Any:
    """A process that is still to be started: one rank of as many that work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vipbench.harness.runs.job", "tests.integration.launching"])
    return context.Process(target=_work_as_rank, args=(work, arguments, rank, world, port))


def _work_as_rank(work: Callable[..., None], arguments: Sequence[Any], rank: int, world: int, port: int) -> None:
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
    if world > 1:
        values = (rank, world, rank, world, "127.0.0.1", port)
        os.environ.update(zip(OF_LAUNCHERS, map(str, values), strict=True))
    torch.set_num_threads(1)  # as `environment` has it
    work(*arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Have so many ranks do something together, which must succeed."""
    port = free_port()
    ranks = [forked(work, *arguments, rank=rank, world=world, port=port) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world


def run_in(folder: Path) -> None:
    """The run of the config in a folder, in this process."""
    os.chdir(folder)
    execute(load_config(Path("config.yaml")))


def run_on_ranks(world: int, config: dict[str, Any], folder: Path) -> Path:
    """The directory of a run of so many ranks that must succeed."""
    write_config(config, folder)
    on_ranks(world, run_in, folder)
    return run_directory(folder)


def write_config(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def run(launcher: Sequence[str], config: dict[str, Any], folder: Path, *overrides: str) -> Path:
    """The directory of a run that must succeed."""
    write_config(config, folder)
    result = launch([*launcher, *RUN, "config.yaml", *overrides], folder)
    assert result.returncode == 0, result.stderr
    return run_directory(folder)


def run_directory(folder: Path) -> Path:
    (path,) = [path for path in (folder / "runs").iterdir() if not path.name.startswith(".")]
    return path


def assert_same_run(path: Path, reference: Path, within: float = 1e-5) -> None:
    """One identity; learned prompts within a distance; losses, logits and metrics equal up to the rounding of a sum's order."""
    assert path.name == reference.name
    prompts, expected = load_file(path / "prompts.safetensors"), load_file(reference / "prompts.safetensors")
    assert prompts.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (prompts[name] - tensor).abs().max() < within, name
    steps, theirs = (pd.read_json(run / "steps.jsonl", lines=True) for run in (path, reference))
    pd.testing.assert_frame_equal(steps, theirs, rtol=1e-4, atol=1e-5)
    predictions, record = (pd.read_parquet(run / "predictions.parquet") for run in (path, reference))
    assert predictions["id"].tolist() == record["id"].tolist()
    logits, expected_logits = (np.stack(frame["logits"].to_list()) for frame in (predictions, record))
    assert np.abs(logits - expected_logits).max() < 1e-3
    metrics, wanted = read_json(path / "metrics.json"), read_json(reference / "metrics.json")
    for name, value in wanted.items():
        if isinstance(value, float):
            assert abs(metrics[name] - value) < 1e-4, name
