"""Real processes: python, torchrun and accelerate launch train and test the same run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
RUN = [str(ROOT / "harness" / "run.py")]


def launch(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    of_launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_launchers}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def torchrun(processes: int) -> list[str]:
    return [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", str(processes), *RUN]


def accelerate(*options: str) -> list[str]:
    return [str(SCRIPTS / "accelerate"), "launch", "--main_process_port", "0", *options, *RUN]


def run_directory(command: list[str], config: dict[str, Any], folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = launch([*command, "config.yaml", *overrides], folder)
    assert result.returncode == 0, result.stderr
    (path,) = [path for path in (folder / "runs").iterdir() if not path.name.startswith(".")]
    return path


@pytest.mark.parametrize(
    "overrides", [(), ("method=cocoop", "train.batch_size=1", "train.epochs=1")], ids=["vip", "cocoop B=1"]
)
def test_all_launchers_give_the_same_run(
    base_config: dict[str, Any], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Batches of 5 (or 1) do not divide by the ranks, nor do 21 test images; the run is the same one."""
    commands = {
        "python": [sys.executable, *RUN],
        "torchrun 2": torchrun(2),
        "accelerate": accelerate("--num_processes", "1", "--cpu"),
    }
    if not overrides:
        commands["torchrun 3"] = torchrun(3)
        commands["accelerate 2"] = accelerate("--multi_gpu", "--num_processes", "2")
    paths = {
        name: run_directory(command, base_config, tmp_path / str(index), *overrides)
        for index, (name, command) in enumerate(commands.items())
    }
    assert len({path.name for path in paths.values()}) == 1
    expected = load_file(paths["python"] / "prompts.safetensors")
    record = pd.read_parquet(paths["python"] / "predictions.parquet")
    for name, path in paths.items():
        prompts = load_file(path / "prompts.safetensors")
        assert all((prompts[key] - expected[key]).abs().max() < 1e-5 for key in expected), name
        predictions = pd.read_parquet(path / "predictions.parquet")
        assert predictions["id"].tolist() == record["id"].tolist(), name
        assert len(predictions) == 21


def test_accelerate_that_starts_fewer_processes_than_asked_is_refused(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base_config))
    result = launch([*accelerate("--num_processes", "2", "--cpu"), "config.yaml"], tmp_path)
    assert result.returncode != 0
    assert (
        "error: accelerate launch was asked for several processes, but on this machine it started one" in result.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_one_line(base_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base_config))
    result = launch([sys.executable, *RUN, "config.yaml", "train.epoch=3"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: config: train.epoch: unknown key; did you mean 'epochs'?"
