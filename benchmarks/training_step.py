"""One training step from the feature bank against the plain textbook path (benchmarks/textbook.py).

    python -m benchmarks training_step

ViT-B-16 with random weights, 2 classes of 4 symptoms, fp32; batch 32 for CoOp and ViP, 8 for CoCoOp. Both paths do forward,
backward and an SGD step; times are medians. The floor of a step is the time that its matrix products would take at the speed of
a large matrix product on this machine.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, count_flops, matrix_peak, median_seconds
from benchmarks.textbook import plain_logits
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.system.devices import choose_device

CLASSES = ["melanoma", "nevus"]
SYMPTOMS = [
    [
        "asymmetric shape with a jagged border",
        "several shades of brown and black",
        "a blue-white veil",
        "uneven dots and streaks",
    ],
    ["round symmetric shape", "one even shade of brown", "smooth well defined border", "regular net of brown lines"],
]
BATCH = {"coop": 32, "vip": 32, "cocoop": 8}
STEPS = 3  # timed, of the plain path; ten times as many of ours


def stepper(method: Method, labels: Tensor) -> Callable[[Callable[[], Tensor]], None]:
    """A function that takes one SGD step on the logits that it is given a way to compute."""
    optimizer = torch.optim.SGD(list(method.trainable().values()), 0.002, momentum=0.9, weight_decay=5e-4)

    def step(logits: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(), labels).backward()
        optimizer.step()

    return step


def _logits(method: Method, features: Tensor) -> Tensor:
    return method(features).logits


def measure() -> Result:
    """Seconds per step of both paths, and their ratio."""
    torch.manual_seed(0)
    device = choose_device("auto").type
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"), device)
    peak = matrix_peak(device)
    rows: list[dict[str, Any]] = []
    for name, batch in BATCH.items():
        cls = method_class(name)
        method = cls(cls.Config(name=name), Task(CLASSES, SYMPTOMS), backbone).to(device).train()
        pixels = torch.randn(batch, 3, backbone.image_size, backbone.image_size, device=device)
        step = stepper(method, torch.randint(2, (batch,), device=device))
        plain = plain_logits(method, backbone)
        with torch.no_grad():
            features = backbone.encode_images(pixels)
            assert (plain(pixels) - method(features).logits).abs().max() < 1e-3, "both paths compute the same"
        ours, theirs = partial(_logits, method, features), partial(plain, pixels)
        ours_s, plain_s = median_seconds(lambda: step(ours), 10 * STEPS), median_seconds(lambda: step(theirs), STEPS)  # noqa: B023
        floor_s = count_flops(lambda: step(ours)) / peak  # noqa: B023 - called at once, as above
        rows.append(
            {
                "method": name,
                "batch": batch,
                "plain_s": plain_s,
                "ours_s": ours_s,
                "ratio": plain_s / ours_s,
                "floor_s": floor_s,
            }
        )
    return Result(
        "A training step from the bank against the textbook path (ViT-B-16, 2 classes x 4 symptoms, fp32)",
        rows,
        [f"floor: the step's FLOPs at {peak / 1e9:.0f} GFLOP/s, which a large matrix product reaches here"],
    )
