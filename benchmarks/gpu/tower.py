"""The image tower that fills the bank: images/s and FLOP/s against the card's measured matrix peak.

In every precision as runs compute it (fp32 weights under autocast), and in half precision with the weights cast once: the
matrices alone, which gives the same bits, or all of the tower, norms too. open_clip's residual stream is in half precision in
each of them, since its norms give back the dtype that they are given.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.kernels import peak_mib
from benchmarks.gpu.setting import Row, Setting
from benchmarks.measure import count_flops, matrix_peak, median_seconds
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.system.devices import choose_device

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AS_RUN, MATRICES, ALL = "as run", "matrices cast once", "all of it"


def measure(setting: Setting, begin: Callable[[], None]) -> Iterator[Row]:
    """A row for each way to compute."""
    backbone = setting.backbone()
    begin()
    device = choose_device("auto").type
    towers = Towers(backbone.to(device), setting, device)
    usual, *others = setting.batches
    precisions = [name for name in DTYPES if device == "cuda" or name in ("fp32", "bf16")]
    for precision in precisions:
        yield towers.row(precision, AS_RUN, usual)
    half = [name for name in precisions if DTYPES[name] != torch.float32]
    for precision in half:
        for weights in (MATRICES, ALL):
            yield towers.row(precision, weights, usual)
            yield towers.row(precision, weights, usual, channels_last=True)
    for batch in others:
        for weights in (AS_RUN, ALL):
            yield towers.row("bf16", weights, batch)


class Towers:
    """The image tower with its weights in several forms, each made once."""

    def __init__(self, backbone: Backbone, setting: Setting, device: str) -> None:
        self.backbone, self.setting, self.device = backbone, setting, device
        self.flops = count_flops(lambda: backbone.image(self.pixels(1)))
        self._peaks: dict[str, float] = {}
        self._exact: dict[int, Tensor] = {}

    def pixels(self, batch: int) -> Tensor:
        """Random pixels [batch, 3, H, W], the same ones each time."""
        numbers = torch.Generator(self.device).manual_seed(0)
        return torch.randn(batch, *self.backbone.pixels_shape, device=self.device, generator=numbers)

    def peak(self, precision: str) -> float:
        """FLOP/s of a large matrix product."""
        if precision not in self._peaks:
            self._peaks[precision] = matrix_peak(self.device, DTYPES[precision], self.setting.matrix)
        return self._peaks[precision]

    def tower(self, weights: str, dtype: torch.dtype) -> nn.Module:
        """The tower with its weights in a form."""
        if weights == AS_RUN:
            return self.backbone.image
        tower = copy.deepcopy(self.backbone.image)
        return tower.to(dtype) if weights == ALL else cast_matrices(tower, dtype)

    def row(self, precision: str, weights: str, batch: int, channels_last: bool = False) -> Row:
        """Images/s and what part of the peak they are; and the largest difference of a unit feature from fp32."""
        choose_device("auto", precision=precision if self.device == "cuda" else "fp32")
        dtype = DTYPES[precision]
        tower, pixels = self.tower(weights, dtype), self.pixels(batch)
        exact = self._exact_features(batch, pixels)
        if channels_last:
            tower, pixels = tower.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
        inputs = pixels.to(dtype) if weights == ALL else pixels
        compute = partial(self.features, tower, inputs, weights, dtype)
        seconds = median_seconds(compute, self.setting.repeats)
        rate = self.flops * batch / seconds
        found = {"precision": precision, "weights": weights, "channels_last": channels_last, "batch": batch}
        found |= {"images_per_s": batch / seconds, "tflops": rate / 1e12, "peak_tflops": self.peak(precision) / 1e12}
        found |= {"part_of_peak": rate / self.peak(precision), "peak_mib": peak_mib(compute)}
        return found | {"from_fp32": float((compute() - exact).abs().max())}

    def _exact_features(self, batch: int, pixels: Tensor) -> Tensor:
        if batch not in self._exact:
            self._exact = {batch: self.features(self.backbone.image, pixels, AS_RUN, torch.float32)}
        return self._exact[batch]

    def features(self, tower: nn.Module, pixels: Tensor, weights: str, dtype: torch.dtype) -> Tensor:
        """Unit features [batch, d] float32 of a tower that `tower` gave for these weights and dtype."""
        mixed = weights != ALL and dtype != torch.float32
        autocast: AbstractContextManager[Any] = torch.autocast(self.device, dtype) if mixed else nullcontext()
        with torch.no_grad(), autocast:
            return nn.functional.normalize(tower(pixels).float(), dim=-1)


def cast_matrices(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast in place the weights that autocast would cast in each pass: of products and convolutions, and no others."""
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return tower
