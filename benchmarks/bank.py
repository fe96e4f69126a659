"""Filling the feature bank: images per second and FLOP/s of the image tower against the machine's measured matrix peak.

    python -m benchmarks bank

ViT-B-16 with random weights on pixels that are on the device already, so that it is the tower that is measured; the reader has
a benchmark of its own.
"""

from typing import Any

import torch

from benchmarks.measure import Result, count_flops, matrix_peak, median_seconds
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.system.devices import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure() -> Result:
    """Images/s, TFLOP/s and the part of the peak, for each precision."""
    device = choose_device("auto").type
    batch = 256 if device == "cuda" else 32
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"), device)
    pixels = torch.randn(batch, 3, backbone.image_size, backbone.image_size, device=device)
    flops = count_flops(lambda: backbone.encode_images(pixels[:1]))
    rows: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            seconds = median_seconds(lambda: backbone.encode_images(pixels), 20 if device == "cuda" else 3)
        peak, reached = matrix_peak(device, dtype), flops * batch / seconds
        rows.append(
            {
                "precision": name,
                "batch": batch,
                "images_per_s": batch / seconds,
                "tflops": reached / 1e12,
                "peak_tflops": peak / 1e12,
                "part_of_peak": reached / peak,
                "floor_s_per_image": flops / peak,
                "bank_bytes_per_view": backbone.dim * dtype.itemsize + 4,
            }
        )
    return Result(
        "The image tower that fills the bank (ViT-B-16)", rows, [f"{flops / 1e9:.1f} GFLOP of matrix products an image"]
    )
