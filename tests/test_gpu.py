"""On a CUDA device: the same numbers as on a CPU, half precision, CoCoOp's memory, NCCL, and DeepSpeed with CPU offload.

The bounds between GPU and CPU are those that full fp32 keeps: sums in another order move a unit vector's entries by some 1e-7
per layer, TF32 by about 1e-3. They were set without a GPU at hand and have not been measured on one yet.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import MODELS
from tests.integration import launching
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.devices import choose_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible here"),
]


def run(base: dict[str, Any], out: Path, *overrides: str) -> Path:
    return execute(resolve_config(override(base, [f"run.out={out}", *overrides])))


@pytest.mark.parametrize("method", ["zero_shot", "coop", "cocoop", "vip", "kgcoop", "prograd", "biomedcoop"])
def test_a_gpu_gives_the_numbers_of_a_cpu(base_config: dict[str, Any], tmp_path: Path, method: str) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        path = run(base_config, tmp_path / device, f"method={method}", f"run.device={device}")
        logits.append(np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()))
    # Logits are about 14 times (the untrained scale) a product of unit vectors; training amplifies what they start with.
    assert np.abs(logits[0] - logits[1]).max() < (1e-4 if method == "zero_shot" else 1e-3)


@pytest.mark.parametrize(
    "settings",
    [["method=clip_lora", "train.epochs=null", "train.steps=9", "train.lr=0.001"], ["method=maple", "method.depth=2"]],
    ids=["clip_lora", "maple"],
)
def test_a_gpu_trains_inside_the_towers_as_a_cpu(
    base_config: dict[str, Any], model_folder: Path, tmp_path: Path, settings: list[str]
) -> None:
    """The same features are dropped on both."""
    base, logits = {**base_config, "method": {}, "backbone": {"name": str(model_folder / "vit.json")}}, []
    for device in ("cpu", "cuda"):
        path = run(base, tmp_path / device, *settings, f"run.device={device}")
        logits.append(np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()))
    assert np.abs(logits[0] - logits[1]).max() < 1e-2


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_gpu_gives_the_features_of_a_cpu(model_folder: Path, kind: str) -> None:
    choose_device("cuda")
    config, numbers = BackboneConfig(name=str(model_folder / f"{kind}.json")), torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32, generator=numbers)
    features = []
    for device in ("cpu", "cuda"):
        backbone = load_backbone(config, device)
        with torch.no_grad():
            images = backbone.encode_images(pixels.to(device)).cpu()
            texts = F.normalize(backbone.text.encode_texts(["a photo of a melanoma.", "round"]), dim=-1).cpu()
        features.append((images, texts))
    for cpu, cuda in zip(*features, strict=True):
        assert (cpu - cuda).abs().max() < 1e-5


def test_tf32_is_on_only_where_it_is_asked_for(base_config: dict[str, Any], tmp_path: Path) -> None:
    """Products rounded to 10 bits move logits, by far less than half precision would."""
    logits = []
    for precision in ("fp32", "tf32"):
        path = run(base_config, tmp_path, "method=zero_shot", f"precision={precision}", "run.device=cuda")
        logits.append(np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert np.abs(logits[0] - logits[1]).max() < 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["coop", "cocoop", "vip", "prograd", "biomedcoop", "tip_adapter_f"])
def test_half_precision_trains(base_config: dict[str, Any], tmp_path: Path, method: str, precision: str) -> None:
    run(base_config, tmp_path, f"method={method}", f"precision={precision}", "run.device=cuda", "train.epochs=6")
    row = read_runs(tmp_path).iloc[0]
    assert row["metrics.samples"] == 21
    assert np.isfinite(row["metrics.ece"])


def test_cocoop_with_batch_32_and_100_classes_fits() -> None:
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"), "cuda")
    cls = method_class("cocoop")
    method = cls(cls.Config(name="cocoop"), Task([f"finding number {index}" for index in range(100)]), backbone).cuda()
    inputs = F.normalize(torch.randn(32, backbone.dim, device="cuda"), dim=-1)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.float16):
        loss = method.losses(method(inputs), torch.zeros(32, dtype=torch.long, device="cuda"))["cross_entropy"].mean()
    loss.backward()
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"CoCoOp, ViT-B-16, fp16, batch 32, 100 classes: peak {peak:.2f} GiB on {torch.cuda.get_device_name()}")
    assert peak < 8


@pytest.fixture(scope="module")
def cuda_config(base_config: dict[str, Any]) -> dict[str, Any]:
    train = {**base_config["train"], "warmup_epochs": 0}
    return {**base_config, "train": train, "run": {**base_config["run"], "device": "cuda"}}


@pytest.fixture(scope="module")
def one_gpu(cuda_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launching.run(launching.PYTHON, cuda_config, tmp_path_factory.mktemp("one_gpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; NCCL allows one process on each")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "zero3.json"])
def test_two_gpus_give_the_run_of_one(
    cuda_config: dict[str, Any], one_gpu: Path, tmp_path: Path, launcher: str
) -> None:
    ddp = ["--config_file", str(launching.LAUNCH / "ddp_8_gpus.yaml"), "--num_processes", "2"]
    launchers = {"torchrun": launching.torchrun(2), "accelerate": launching.accelerate(*ddp)}
    command = launchers.get(launcher) or launching.deepspeed(launcher, 2)
    launching.assert_same_run(launching.run(command, cuda_config, tmp_path), one_gpu, within=1e-4)


@pytest.mark.parametrize("settings", ["zero2.json", "zero3.json", "zero3_offload.json"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_on_one_gpu(
    cuda_config: dict[str, Any], one_gpu: Path, tmp_path: Path, settings: str, precision: str
) -> None:
    """In fp32 the run is that of one process; bf16 is autocast inside DeepSpeed, so the tower's numbers are rounded, not lost."""
    pytest.importorskip("deepspeed")
    path = launching.run(launching.deepspeed(settings, 1), cuda_config, tmp_path, f"precision={precision}")
    if precision == "fp32":
        launching.assert_same_run(path, one_gpu, within=1e-4)
    else:
        losses, exact = (pd.read_json(run / "steps.jsonl", lines=True)["loss"] for run in (path, one_gpu))
        assert (losses - exact).abs().max() < 0.1
        assert (losses - exact).abs().max() > 0, "bf16 was not on"
