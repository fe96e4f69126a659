"""Every method on a CUDA device: the CPU's numbers in fp32, and half precision that trains.

The bounds between GPU and CPU are those that full fp32 keeps: sums in another order move a unit vector's entries by some 1e-7
per layer, TF32 by about 1e-3.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import MODELS
from tests.gpu import GPU
from tests.zoo import small_config
from vipbench.harness.config.schema import BackboneConfig, Config
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.runs.execute import execute
from vipbench.harness.system.devices import choose_device

pytestmark = GPU


def logits(base: dict[str, Any], out: Path, name: str, *overrides: str) -> np.ndarray:
    """Test logits [21, 3] of a short run."""
    run = execute(small_config(base, name, out, *overrides))
    return np.stack(pd.read_parquet(run / "predictions.parquet")["logits"].to_list())


def bound(config: Config) -> float:
    """The largest difference of logits that fp32 may leave.

    They are about 14 times (the untrained scale) a product of unit vectors; learning amplifies what it starts with,
    inside the towers in every layer.
    """
    cls = method_class(config.method.name)
    if not cls.trains and cls.support(config.method) is None:
        return 1e-4
    return 1e-2 if cls.needs == "images" else 1e-3


@pytest.mark.parametrize("name", method_names())
def test_every_method_in_every_precision(
    base_config: dict[str, Any], tmp_path: Path, name: str, record_property: Any
) -> None:
    if name == "waffle":
        pytest.importorskip("wordfreq", reason="WaffleCLIP draws from wordfreq, which is too large to be carried along")
    cpu = logits(base_config, tmp_path / "cpu", name, "run.device=cpu")
    found = {
        precision: logits(base_config, tmp_path / precision, name, "run.device=cuda", f"precision={precision}")
        for precision in ("fp32", "tf32", "bf16", "fp16")
    }
    differences = {precision: float(np.abs(values - cpu).max()) for precision, values in found.items()}
    record_property("differences", differences)
    assert differences["fp32"] < bound(small_config(base_config, name, tmp_path)), differences
    for precision, values in found.items():
        assert values.shape == (21, 3) and np.isfinite(values).all(), precision


@pytest.mark.parametrize("name", [name for name in method_names() if method_class(name).trains])
def test_a_step_as_a_cuda_graph_trains_the_same(
    base_config: dict[str, Any], tmp_path: Path, name: str, record_property: Any
) -> None:
    settings = ["run.device=cuda", "train.max_grad_norm=1.0"]
    if method_class(name).combine is not Method.combine:
        with pytest.raises(UserError, match="combines several gradients"):
            logits(base_config, tmp_path, name, *settings, "run.cuda_graph=true")
        return
    for precision, within in (("fp32", 1e-3), ("fp16", 0.5)):
        found = [
            logits(base_config, tmp_path / on, name, *settings, f"precision={precision}", f"run.cuda_graph={on}")
            for on in ("false", "true")
        ]
        difference = float(np.abs(found[0] - found[1]).max())
        record_property(precision, difference)
        assert difference < within, precision


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
    found = []
    for precision in ("fp32", "tf32"):
        found.append(logits(base_config, tmp_path, "zero_shot", f"precision={precision}", "run.device=cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert np.abs(found[0] - found[1]).max() < 0.1
