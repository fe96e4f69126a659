"""An image tower whose own weights are learned: a view in which they are copies, while what stays frozen is the tower's own."""

from types import SimpleNamespace
from typing import Any, Literal

from timm.models import group_parameters
from torch import nn

from vipbench.harness.errors import UserError
from vipbench.harness.models.open_clip_internals import ModifiedResNet, TimmModel, VisionTransformer
from vipbench.harness.models.timm_tower import TimmTower
from vipbench.harness.models.tower_view import view

Part = Literal["last", "all"]


def trained_view(tower: nn.Module, part: Part) -> nn.Module:
    """A view of an image tower in which all weights are learned, or those of the last block and of what follows it.

    It computes with torch's plain autograd: no checkpointing, and nothing is kept of what lies before the first learned weight.

    Raises:
        UserError: the tower's last block is not known.
    """
    names = [name for name, _ in tower.named_parameters()] if part == "all" else _from_last_block(tower)
    tower = view(tower)
    for name in names:
        path, _, own = name.rpartition(".")
        parent = tower.get_submodule(path)
        setattr(parent, own, nn.Parameter(getattr(parent, own).detach().clone()))
    return tower


def _from_last_block(tower: Any) -> list[str]:
    """Names of the parameters of the last block, and of what follows it."""
    if isinstance(tower, TimmModel):
        head = [f"head.{name}" for name, _ in tower.head.named_parameters()]
        return [f"trunk.{name}" for name in _from_last_block(tower.trunk)] + head
    if isinstance(tower, TimmTower):
        return [f"model.{name}" for name in _from_last_block(tower.model)]
    names = [name for name, _ in tower.named_parameters()]
    if isinstance(tower, VisionTransformer):
        last = f"transformer.resblocks.{len(tower.transformer.resblocks) - 1}."
        return [name for name in names if name.startswith((last, "attn_pool", "ln_post", "proj"))]
    if isinstance(tower, ModifiedResNet):
        return [name for name in names if name.startswith((f"layer4.{len(tower.layer4) - 1}.", "attnpool."))]
    if not hasattr(tower, "group_matcher"):
        kind = type(tower).__name__
        raise UserError(f"method.blocks: the last block of a {kind} is not known; use method.blocks=all")
    # timm's groups from the stem on, a block each; "?" is in the group of all that timm counts to no block, which comes last.
    named: Any = SimpleNamespace(named_parameters=lambda: [(name, None) for name in [*names, "?"]])
    groups = group_parameters(named, tower.group_matcher())
    rest = next(number for number, group in groups.items() if "?" in group)
    return [name for name in [*groups[rest - 1], *groups[rest]] if name != "?"]
