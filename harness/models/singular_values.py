"""Learned singular values of all linear maps in the blocks of a tower's view (CLIP-SVD, arXiv 2509.03740).

A frozen weight W = U diag(s) V^T becomes U diag(s') V^T, computed as (x V diag(s')) U^T: in a training step that takes as
many products as the weight itself would, without the gradient of a weight, since U and V are frozen. The decomposition is the
CPU's, whatever computes later, so that it is the same on all devices and ranks.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.errors import UserError
from vipbench.harness.models.lora import LoraAttention
from vipbench.harness.models.text_tower import TextTower
from vipbench.harness.models.tower_view import ImageTowerView
from vipbench.harness.system.devices import to_host
from vipbench.harness.system.progress import Progress


class SingularValues(nn.Module):
    """The singular values of n weights [n, outputs, inputs] that take one input.

    Attributes:
        values: [n, r], learned; r is the smaller of outputs and inputs. start: [n, r], as they are in the frozen weights.
        u: [n, outputs, r]. v: [n, r, inputs].
    """

    u: Tensor
    v: Tensor
    start: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        u, start, v = torch.linalg.svd(to_host(weights), full_matrices=False)
        self.values = nn.Parameter(start.clone())
        for name, tensor in {"u": u, "v": v, "start": start}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None, whole: bool = True) -> Tensor:
        """Compute the n maps of x [..., inputs], or with `whole` False what learning added to them: [..., n * outputs].

        Args:
            bias: [n * outputs].
        """
        maps, outputs, rank = self.u.shape
        hidden = F.linear(x.flatten(0, -2), self.v.flatten(0, 1)).unflatten(-1, (maps, rank))
        hidden = hidden * (self.values if whole else self.values - self.start)
        biases = [None] * maps if bias is None else bias.split(outputs)
        parts = [F.linear(hidden[:, place], self.u[place], biases[place]) for place in range(maps)]
        return (parts[0] if maps == 1 else torch.cat(parts, dim=-1)).unflatten(0, x.shape[:-1])


class SingularLinear(nn.Module):
    """A frozen linear map, or several side by side, with learned singular values."""

    def __init__(self, linear: nn.Linear, singular: SingularValues) -> None:
        super().__init__()
        self.linear, self.maps = linear, singular.__call__  # not a module of this one, as in add_lora

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, self.linear.bias)


class SingularAttention(LoraAttention):
    """A frozen self-attention with learned singular values of its queries, keys and values.

    Packed text (harness/models/packed_text.py) adds `update` to what the frozen weights give.
    """

    def __init__(self, attention: nn.MultiheadAttention, singular: SingularValues) -> None:
        super().__init__(attention, singular)
        self.maps, self.update = singular.__call__, partial(singular.__call__, whole=False)

    def qkv(self, x: Tensor) -> Tensor:
        return self.maps(x, self.in_proj_bias)


def add_singular_values(tower: ImageTowerView | TextTower) -> nn.ModuleList:
    """Have each block of a tower's view compute with learned singular values of its attention and its MLP.

    Returns:
        The values, which the view calls but does not hold, as with `vipbench.harness.models.lora.add_lora`.

    Raises:
        UserError: a block has no linear maps of a known kind.
    """
    if isinstance(tower, TextTower):
        tower.learns = True
    found: list[tuple[Any, str]] = []
    for block in tower.blocks:
        own = list(_maps(block))
        if not own:
            kind = type(block).__name__
            raise UserError(f"backbone: no linear maps are known in a {kind}; use a CLIP, or a BERT text tower")
        found += own
    added = nn.ModuleList()
    with Progress("decompose weights", len(found), "modules") as progress:
        for parent, name in found:
            module = getattr(parent, name)
            if isinstance(module, nn.MultiheadAttention):
                singular = SingularValues(module.in_proj_weight.unflatten(0, (3, -1)))
                setattr(parent, name, SingularAttention(module, singular))
            else:
                maps = 3 if name == "qkv" else 1
                singular = SingularValues(module.weight.unflatten(0, (maps, -1)))
                setattr(parent, name, SingularLinear(module, singular))
            added.append(singular)
            progress.advance()
    return added


def _maps(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The linear maps of a block; that of an attention's output before the attention itself, which takes it along."""
    for parent in reversed(list(block.modules())):
        for name, child in parent.named_children():
            attention = isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None
            if attention or isinstance(child, nn.Linear):
                yield parent, name
