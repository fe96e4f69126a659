"""Processes on CUDA devices: NCCL and torchrun with one, DeepSpeed with CPU offload, and two where there are two."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from tests.gpu import GPU
from tests.integration import launching
from vipbench.harness.config.overrides import override
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json

pytestmark = GPU


@pytest.fixture(scope="module")
def one_gpu(gpu_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, this one."""
    out = tmp_path_factory.mktemp("one_gpu") / "runs"
    return execute(resolve_config(override(gpu_config, [f"run.out={out}"])))


def test_nccl_carries_what_ranks_exchange(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        values = torch.arange(3.0, device="cuda")
        found, objects = [torch.empty_like(values)], [{"a": 1}]
        dist.all_reduce(values)
        dist.all_gather(found, values)
        dist.broadcast_object_list(objects, src=0)
        assert found[0].tolist() == [0.0, 1.0, 2.0] and objects == [{"a": 1}]
    finally:
        dist.destroy_process_group()


def test_torchrun_on_one_gpu(gpu_config: dict[str, Any], one_gpu: Path, tmp_path: Path) -> None:
    path = launching.run(launching.torchrun(1), gpu_config, tmp_path)
    launching.assert_same_run(path, one_gpu, within=1e-4)
    hardware = read_json(path / "provenance.json")["hardware"]
    assert hardware["launcher"] == "torchrun" and hardware["devices"] == [torch.cuda.get_device_name()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; NCCL allows one process on each")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "zero3.json"])
def test_two_gpus_give_the_run_of_one(gpu_config: dict[str, Any], one_gpu: Path, tmp_path: Path, launcher: str) -> None:
    ddp = ["--config_file", str(launching.LAUNCH / "ddp_8_gpus.yaml"), "--num_processes", "2"]
    launchers = {"torchrun": launching.torchrun(2), "accelerate": launching.accelerate(*ddp)}
    command = launchers.get(launcher) or launching.deepspeed(launcher, 2)
    launching.assert_same_run(launching.run(command, gpu_config, tmp_path), one_gpu, within=1e-4)


@pytest.mark.parametrize("settings", ["zero2.json", "zero3.json", "zero3_offload.json"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_on_one_gpu(
    gpu_config: dict[str, Any], one_gpu: Path, tmp_path: Path, settings: str, precision: str
) -> None:
    """In fp32 the run is that of one process; bf16 is autocast inside DeepSpeed, so the tower's numbers are rounded, not lost."""
    pytest.importorskip("deepspeed")
    path = launching.run(launching.deepspeed(settings, 1), gpu_config, tmp_path, f"precision={precision}")
    if precision == "fp32":
        launching.assert_same_run(path, one_gpu, within=1e-4)
    else:
        losses, exact = (pd.read_json(run / "steps.jsonl", lines=True)["loss"] for run in (path, one_gpu))
        assert (losses - exact).abs().max() < 0.1
        assert (losses - exact).abs().max() > 0, "bf16 was not on"
