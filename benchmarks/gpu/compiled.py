"""torch.compile of the image tower's blocks and of the text tower's blocks in a ViP step, against the same uncompiled."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.setting import Row, Setting, workspace
from benchmarks.gpu.tower import ALL, AS_RUN, DTYPES, Towers
from benchmarks.measure import median_seconds
from vipbench.harness.models import packed_text


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """Rows of the image tower with its weights as run and in half precision, and of a step."""
    with workspace(setting, precision, begin) as place:
        towers = Towers(place.inputs.backbone, setting, place.device)
        for weights in (ALL, AS_RUN):
            yield _tower(towers, setting, place.precision, weights, setting.batches[0])
        training = place.job("vip").training
        assert training is not None
        engine, parts = training.engine(), training.parts(next(training.batches()), None)
        plain = packed_text._block
        eager = median_seconds(lambda: engine.step(parts), setting.repeats)
        packed_text._block = torch.compile(plain, backend=setting.compiler)
        try:
            row = _compare(lambda: engine.step(parts), eager, setting.repeats)
        finally:
            packed_text._block = plain
        yield {"what": "ViP step", "precision": place.precision, "weights": AS_RUN, "batch": len(parts[0][1]), **row}


def _tower(towers: Towers, setting: Setting, precision: str, weights: str, batch: int) -> Row:
    dtype = DTYPES[precision]
    tower = towers.tower(weights, dtype)
    pixels = towers.pixels(batch).to(dtype if weights == ALL else torch.float32)

    def encode() -> Any:
        return towers.features(tower, pixels, weights, dtype)

    eager = median_seconds(encode, setting.repeats)
    blocks: Any = tower.transformer
    for block in blocks.resblocks:
        assert isinstance(block, nn.Module)
        block.compile(backend=setting.compiler)
    row = _compare(encode, eager, setting.repeats)
    reached = towers.flops * batch / row["compiled_ms"] * 1e3
    for block in blocks.resblocks:
        block._compiled_call_impl = None  # the run's own tower is used again
    found = {"what": "image tower", "precision": precision, "weights": weights, "batch": batch, **row}
    return found | {"images_per_s": batch / row["compiled_ms"] * 1e3, "part_of_peak": reached / towers.peak(precision)}


def _compare(run: Callable[[], Any], eager: float, repeats: int) -> Row:
    began = time.perf_counter()
    run()
    first, compiled = time.perf_counter() - began, median_seconds(run, repeats)
    return {"eager_ms": 1e3 * eager, "compiled_ms": 1e3 * compiled, "ratio": eager / compiled, "first_call_s": first}
