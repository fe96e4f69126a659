"""Real processes: DeepSpeed ZeRO 1, 2 and 3 through accelerate launch, on DeepSpeed's CPU accelerator."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.launching import (
    LAUNCH,
    PYTHON,
    accelerate,
    assert_same_run,
    deepspeed,
    launch,
    run,
    write_config,
)
from vipbench.harness.system.files import read_json

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.integration

FAILING = str(Path(__file__).with_name("failing_run.py"))
WORKER = str(Path(__file__).with_name("engine_states.py"))


@pytest.fixture
def everything_sharded(tmp_path: Path) -> str:
    """ZeRO-3 that shards small weights too, which it would otherwise keep whole."""
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return str(path)


def test_zero_1_by_options(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path) -> None:
    options = accelerate("--use_deepspeed", "--zero_stage", "1", "--num_processes", "2")
    assert_same_run(run(options, vip_config, tmp_path), vip_run)


def test_zero_2(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path) -> None:
    path = run(deepspeed("zero2.json", 2), vip_config, tmp_path)
    assert_same_run(path, vip_run)
    hardware = read_json(path / "provenance.json")["hardware"]
    assert hardware["launcher"] == "accelerate"
    assert re.fullmatch(r"DeepSpeed [\d.]+ ZeRO-2", hardware["engine"])


def test_zero_3(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path, everything_sharded: str) -> None:
    """Four ranks, of which one has two samples of a batch in two passes, and the others one."""
    assert_same_run(run(deepspeed(everything_sharded, 4), vip_config, tmp_path / "run"), vip_run)


def test_zero_3_with_images_encoded_in_training(
    cocoop_config: dict[str, Any], cocoop_run: Path, tmp_path: Path, everything_sharded: str
) -> None:
    assert_same_run(run(deepspeed(everything_sharded, 2), cocoop_config, tmp_path / "run"), cocoop_run)


def test_a_training_goes_on_from_an_optimizers_state(tmp_path: Path, everything_sharded: str) -> None:
    """On every engine the state is the same, and training from it ends where it would have ended without a stop."""
    launchers = {
        "python": PYTHON,
        "zero1": deepspeed("zero1.json", 2),
        "zero2": deepspeed("zero2.json", 2),
        "zero3": deepspeed(everything_sharded, 2),
    }
    tensors = {}
    for name, launcher in launchers.items():
        out = tmp_path / f"{name}.safetensors"
        result = launch([*launcher, WORKER, str(out)], tmp_path)
        assert result.returncode == 0, result.stderr
        tensors[name] = load_file(out)
    states = {key.rpartition(".")[2] for key in tensors["python"] if ".state." in key}
    assert states == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    for name, parts in tensors.items():
        assert parts.keys() == tensors["python"].keys()
        for key, value in parts.items():
            assert (value - tensors["python"][key]).abs().max() < 1e-5, (name, key)
            if ".whole." in key:
                assert (parts[key.replace("whole", "resumed")] == value).all(), (name, key, "a stop changes no bit")


def test_a_run_killed_under_zero_3_goes_on_in_one_process(
    vip_config: dict[str, Any], vip_run: Path, tmp_path: Path, everything_sharded: str
) -> None:
    config = {**vip_config, "run": {**vip_config["run"], "checkpoint_steps": 1}}
    write_config(config, tmp_path / "run")
    killed = launch([*deepspeed(everything_sharded, 2), FAILING, "config.yaml"], tmp_path / "run", HOW="killed")
    assert killed.returncode != 0
    path = run(PYTHON, config, tmp_path / "run")
    assert read_json(path / "provenance.json")["resumed_after_step"] == 2
    assert_same_run(path, vip_run)


def test_the_json_files_are_the_stages() -> None:
    stages = {path.stem: read_json(path)["zero_optimization"]["stage"] for path in LAUNCH.glob("*.json")}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
