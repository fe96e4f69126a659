"""Prompts inside a tower: learned vectors that enter before its blocks (VPT, arXiv 2203.12119; MaPLe, arXiv 2210.03117)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vipbench.harness.models.prompts import CONTEXT_STD

Change = Callable[[Tensor], Tensor]


def random_prompts(blocks: int, count: int, width: int) -> nn.ParameterList:
    """Learned vectors N(0, 0.02) for each of some blocks: so many times [count, width]."""
    drawn = [torch.randn(count, width, device="cpu") * CONTEXT_STD for _ in range(blocks)]  # the CPU's generator
    return nn.ParameterList(drawn)


@contextmanager
def changed_inputs(changes: Iterable[tuple[nn.Module, Change]]) -> Iterator[None]:
    """Have the first input of each module changed on its way in, while it is open."""

    def hook(change: Change) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (change(inputs[0]), *inputs[1:])

    handles = [module.register_forward_pre_hook(hook(change)) for module, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def append(vectors: Tensor) -> Change:
    """Put vectors [M, w] after the tokens [B, L, w] of each sample."""
    return lambda x: torch.cat([x, _for_each(vectors, x)], dim=1)


def replace_last(vectors: Tensor) -> Change:
    """Put vectors [M, w] in the place of the last M tokens [B, L, w] of each sample."""
    return lambda x: torch.cat([x[:, : -len(vectors)], _for_each(vectors, x)], dim=1)


def _for_each(vectors: Tensor, x: Tensor) -> Tensor:
    return vectors.to(x.dtype).expand(len(x), -1, -1)
