"""Real processes: accelerate launch, on one process and several, with the files in harness/launch/."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.launching import LAUNCH, RUN, accelerate, assert_same_run, launch, run, write_config
from vipbench.harness.system.files import read_json

pytestmark = pytest.mark.integration


def test_one_process(cocoop_config: dict[str, Any], cocoop_run: Path, tmp_path: Path) -> None:
    one = accelerate("--config_file", str(LAUNCH / "one_gpu.yaml"), "--cpu")
    assert_same_run(run(one, cocoop_config, tmp_path), cocoop_run)


def test_two_processes(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path) -> None:
    two = accelerate("--config_file", str(LAUNCH / "ddp_8_gpus.yaml"), "--num_processes", "2")
    path = run(two, vip_config, tmp_path)
    assert_same_run(path, vip_run)
    hardware = read_json(path / "provenance.json")["hardware"]
    assert (hardware["launcher"], hardware["engine"], hardware["processes"]) == ("accelerate", "DDP", 2)


def test_fewer_processes_than_asked_are_refused(base_config: dict[str, Any], tmp_path: Path) -> None:
    write_config(base_config, tmp_path)
    result = launch([*accelerate("--num_processes", "2", "--cpu"), *RUN, "config.yaml"], tmp_path)
    assert result.returncode != 0
    message = "error: accelerate launch was asked for several processes, but on this machine it started one"
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_not_supported_is_refused(base_config: dict[str, Any], tmp_path: Path) -> None:
    write_config(base_config, tmp_path)
    result = launch([*accelerate("--num_processes", "1", "--use_fsdp"), *RUN, "config.yaml"], tmp_path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: accelerate launch asks for FSDP"), result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_files_for_accelerate_are_those_of_the_documentation() -> None:
    files = {path.name: yaml.safe_load(path.read_text()) for path in LAUNCH.glob("*.yaml")}
    assert {name: (config["num_machines"], config["num_processes"]) for name, config in files.items()} == {
        "one_gpu.yaml": (1, 1),
        "ddp_8_gpus.yaml": (1, 8),
        "ddp_two_nodes.yaml": (2, 16),
        "deepspeed_8_gpus.yaml": (1, 8),
    }
