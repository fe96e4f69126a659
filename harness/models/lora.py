"""Low-rank updates (LoRA, arXiv 2106.09685) of the queries, keys and values in the blocks of a tower's view.

The frozen weights stay as they are; dropout is by keys, see harness/models/stateless_dropout.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.errors import UserError
from vipbench.harness.models.stateless_dropout import current_keys, keep_masks, split_keys
from vipbench.harness.models.text_tower import TextTower
from vipbench.harness.models.tower_view import ImageTowerView, attend


class LowRank(nn.Module):
    """Low-rank updates of n linear maps of one input: scaling * B_i A_i dropout_i(x), side by side.

    Args:
        number: of this module in its tower, so that each one drops other features.

    Attributes:
        a: [n, rank, inputs], Kaiming uniform as in `nn.Linear`. b: [n, outputs, rank], zero.
    """

    def __init__(
        self, maps: int, inputs: int, outputs: int, rank: int, scaling: float, dropout: float, number: int
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(maps, rank, inputs, device="cpu"))  # the CPU's generator
        self.b = nn.Parameter(torch.zeros(maps, outputs, rank, device="cpu"))
        for matrix in self.a.data:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.scaling, self.dropout, self.number = scaling, dropout, number

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., n * outputs]; the keys in force are those of the rows of x, or none."""
        inputs, scaling, keys = x.expand(len(self.a), *x.shape), self.scaling, current_keys()
        if keys is not None and self.dropout:
            tokens = split_keys(keys, x.shape[1]) if x.ndim == 3 else keys
            masks = keep_masks(tokens + self.number, x.shape[-1], self.dropout, len(self.a))
            inputs, scaling = inputs.masked_fill(~masks, 0.0), scaling / (1 - self.dropout)
        hidden = torch.einsum("n...i,nri->n...r", inputs, self.a)
        return scaling * torch.einsum("n...r,nor->...no", hidden, self.b).flatten(-2)


class LoraLinear(nn.Module):
    """A frozen linear map, or several side by side, with low-rank updates."""

    def __init__(self, linear: nn.Linear, low_rank: LowRank) -> None:
        super().__init__()
        self.linear, self.update = linear, low_rank.__call__  # see add_lora on why it is not a module of this one

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.update(x)


class LoraAttention(nn.Module):
    """A frozen self-attention (`nn.MultiheadAttention`, batch first) with low-rank updates of its queries, keys and values."""

    def __init__(self, attention: nn.MultiheadAttention, update: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.out_proj = attention.num_heads, attention.out_proj
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.update = update.__call__

    def qkv(self, x: Tensor) -> Tensor:
        """[B, L, w] -> queries, keys and values [B, L, 3 w]."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias) + self.update(x)

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        return self.out_proj(attend(self.qkv(x), self.num_heads, attn_mask)), None


def add_lora(tower: ImageTowerView | TextTower, rank: int, alpha: float, dropout: float) -> nn.ModuleList:
    """Add updates of the queries, keys and values to each block of a tower's view, scaled by alpha / sqrt(rank).

    Returns:
        The updates. The view calls them, but they are not among its modules: an engine that shards weights gathers a view as a
        whole, which it does for frozen weights only.

    Raises:
        UserError: a block has no attention of a known kind.
    """
    added = nn.ModuleList()
    if isinstance(tower, TextTower):
        tower.learns = True
    for block in tower.blocks:
        found = list(_projections(block))
        if not found:
            raise UserError(
                f"backbone: LoRA is not known for the attention in a {type(block).__name__}; use a CLIP, or a BERT text tower"
            )
        for parent, name in found:
            module: Any = getattr(parent, name)
            attention = isinstance(module, nn.MultiheadAttention)
            inputs = module.embed_dim if attention else module.in_features
            maps = 3 if attention or name == "qkv" else 1
            outputs = inputs if attention else module.out_features // maps
            low_rank = LowRank(maps, inputs, outputs, rank, alpha / math.sqrt(rank), dropout, len(added))
            setattr(parent, name, LoraAttention(module, low_rank) if attention else LoraLinear(module, low_rank))
            added.append(low_rank)
    return added


def _projections(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules of a block that give its queries, keys and values: open_clip's attention, timm's `qkv`, or BERT's three."""
    for parent in block.modules():
        for name, child in parent.named_children():
            linear = isinstance(child, nn.Linear) and name in ("qkv", "query", "key", "value")
            if linear or (isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None):
                yield parent, name
