"""Dropout whose masks are a hash of keys, so that they do not depend on what was drawn before, on how many, or by which process.

The key of a sample or a prompt gives the keys of its tokens, those the masks of their features. A forward pass that is computed
again in the backward pass (activation checkpointing) drops the same features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its constants as signed numbers; products wrap around.
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
BITS = 21  # of a hash for each mask, so that one hash serves up to three

_keys: ContextVar[Tensor | None] = ContextVar("keys of dropout", default=None)


@contextmanager
def dropout_keys(keys: Tensor | None) -> Iterator[None]:
    """Have dropout draw by the keys [n] int64 of the n rows of a tower's input (samples, prompts, tokens); None: drop nothing."""
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


def current_keys() -> Tensor | None:
    """The keys of the pass that is being computed; None outside of training."""
    return _keys.get()


def split_keys(keys: Tensor, count: int) -> Tensor:
    """Keys of the `count` parts of whatever each key stands for: [...] int64 -> [..., count]."""
    multiples = torch.full_like(keys.reshape(-1)[:1].expand(count), STEP).cumsum(0)  # on the device of the keys
    hashes = keys[..., None] + multiples
    hashes.bitwise_xor_(_shifted(hashes, 30)).mul_(FIRST)
    hashes.bitwise_xor_(_shifted(hashes, 27)).mul_(SECOND)
    return hashes.bitwise_xor_(_shifted(hashes, 31))


def keep_masks(keys: Tensor, width: int, rate: float, masks: int = 1) -> Tensor:
    """Independent masks [masks, ..., width] bool that drop a feature with probability `rate`, from keys [...] of tokens."""
    assert 1 <= masks <= 63 // BITS
    hashes = split_keys(keys, width)
    threshold = round(rate * 2**BITS)
    return torch.stack([((hashes >> BITS * place) & (2**BITS - 1)) >= threshold for place in range(masks)])


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills up with zeros."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
