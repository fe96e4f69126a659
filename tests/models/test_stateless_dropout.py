"""Dropout by keys: its statistics, and that a mask depends on its key alone."""

import pytest
import torch

from vipbench.harness.models.lora import LowRank
from vipbench.harness.models.stateless_dropout import dropout_keys, keep_masks, split_keys

KEYS = split_keys(torch.tensor(7), 300)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_masks_keep_their_share(rate: float) -> None:
    """Of all, of each token, of each feature and of each mask, within five standard deviations."""
    masks = keep_masks(KEYS, 256, rate, 3).double()
    for dims in ((), (0,), (1,), (2,)):
        shares = masks.mean([dim for dim in (0, 1, 2) if dim not in dims])
        count = masks.numel() / shares.numel()
        assert (shares - (1 - rate)).abs().max() < 5 * (rate * (1 - rate) / count) ** 0.5


def test_masks_are_independent() -> None:
    """Of neighbouring tokens, features and masks, and of neighbouring keys: correlations within five standard deviations."""
    masks = keep_masks(KEYS, 256, 0.5, 3).double() * 2 - 1
    other = keep_masks(KEYS + 1, 256, 0.5, 3).double() * 2 - 1
    pairs = [
        (masks[0], masks[1]),
        (masks[1], masks[2]),
        (masks[:, 1:], masks[:, :-1]),
        (masks[..., 1:], masks[..., :-1]),
        (masks, other),
    ]
    for first, second in pairs:
        assert (first * second).mean().abs() < 5 / first.numel() ** 0.5


def test_a_mask_is_that_of_its_key_wherever_it_stands() -> None:
    together, order = keep_masks(KEYS, 32, 0.25, 3), torch.randperm(len(KEYS))
    assert torch.equal(keep_masks(KEYS[order], 32, 0.25, 3), together[:, order])
    assert torch.equal(keep_masks(KEYS[5:7], 32, 0.25, 3), together[:, 5:7])
    assert torch.equal(split_keys(KEYS, 9)[:, :4], split_keys(KEYS, 4)), "a longer sequence begins as a shorter one"


def test_dropout_is_on_while_there_are_keys_and_keeps_the_mean() -> None:
    low_rank = LowRank(3, 64, 5, 2, 0.7, 0.25, 0)
    torch.nn.init.normal_(low_rank.b)
    x = torch.randn(1, 1, 64).expand(4000, 1, 64)
    plain = low_rank(x)
    with dropout_keys(split_keys(torch.tensor(3), 4000)):
        dropped = low_rank(x)
    assert torch.equal(low_rank(x), plain) and not torch.equal(dropped, plain)
    error = (dropped.mean(0) - plain[0]).abs() / (dropped.std(0) / 4000**0.5)
    assert error.max() < 5
