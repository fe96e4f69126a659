"""torch.compile and its gain: the text tower's blocks in a ViP step, and the image tower, eager and compiled.

python -m benchmarks compile
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import Result, median_seconds
from benchmarks.training_step import CLASSES, SYMPTOMS, stepper
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models import packed_text
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.system.devices import choose_device

REPEATS = 5


def measure() -> Result:
    """Seconds eager and compiled, seconds to compile, and after how many calls that is earned back."""
    device = choose_device("auto").type
    backbone, cls = load_backbone(BackboneConfig(name="ViT-B-16"), device), method_class("vip")
    method = cls(cls.Config(name="vip"), Task(CLASSES, SYMPTOMS), backbone).to(device).train()
    features = F.normalize(torch.randn(32, backbone.dim, device=device), dim=-1)
    step = stepper(method, torch.randint(2, (32,), device=device))
    pixels = torch.randn(32, 3, backbone.image_size, backbone.image_size, device=device)

    def train() -> None:
        step(lambda: method(features))

    def encode() -> None:
        with torch.no_grad():
            backbone.image(pixels)

    eager = [median_seconds(train, REPEATS), median_seconds(encode, REPEATS)]
    plain = packed_text._block
    packed_text._block = torch.compile(plain)
    rows = [_row("ViP step, blocks of the text tower", train, eager[0])]
    packed_text._block = plain
    backbone.image.compile()
    rows.append(_row("image tower, batch 32", encode, eager[1]))
    return Result("torch.compile (ViT-B-16, fp32)", rows, [])


def _row(what: str, run: Callable[[], None], eager: float) -> dict[str, Any]:
    began = time.perf_counter()
    run()
    first, compiled = time.perf_counter() - began, median_seconds(run, REPEATS)
    saved = eager - compiled
    return {
        "what": what,
        "eager_s": eager,
        "compiled_s": compiled,
        "ratio": eager / compiled,
        "first_call_s": first,
        "calls_to_earn_it": round(first / saved) if saved > 0 else "never",
    }
