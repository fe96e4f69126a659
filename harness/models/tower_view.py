"""Views of a frozen backbone's towers: other modules, the same weights, for a method to change.

Runs share a backbone, so a method never changes it. In a view it may replace modules or have them take other inputs, and nothing
of that is seen from the backbone. Where the activations of the image tower take more memory than they may, its last blocks keep
their inputs alone, and compute the rest again in the backward pass; the numbers are the same.
"""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vipbench.harness.errors import UserError
from vipbench.harness.models.deep_prompts import append, changed_inputs, replace_last
from vipbench.harness.models.open_clip_internals import ResidualAttentionBlock, TimmModel, VisionTransformer
from vipbench.harness.models.stateless_dropout import current_keys, dropout_keys
from vipbench.harness.models.text_tower import TextTower

M = TypeVar("M", bound=nn.Module)

# Memory that autograd keeps of a token, per block and unit of width: 10 to 18 numbers, as the tests measure.
NUMBERS_PER_ACTIVATION = 16


def view(module: M) -> M:
    """A copy of a tree of modules that holds the very same parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    if isinstance(module, TextTower):
        shared[id(module.tokenizer)] = module.tokenizer
    return copy.deepcopy(module, shared)


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` (batch first, without dropout) of a sequence to itself, with the same weights.

    torch's own puts the batch behind the tokens. Its product of such inputs with frozen weights goes token by token, which takes
    several times as long on a CPU.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)

    def forward(  # type: ignore[override]  # the calls of a block alone
        self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend(qkv, self.num_heads, attn_mask)), None


def attend(qkv: Tensor, heads: int, attn_mask: Tensor | None = None) -> Tensor:
    """Attention of queries, keys and values [B, L, 3 w], all heads side by side: [B, L, w]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A block of a view, which keeps its activations for the backward pass, or where memory is short its input alone.

    Args:
        number: of blocks before it.

    Attributes:
        memory_bytes: about how much the activations of all blocks may take (`run.image_memory_gib`).
    """

    memory_bytes: int = 4 * 2**30

    def __init__(self, block: nn.Module, number: int) -> None:
        super().__init__()
        self.block, self.number = block, number

    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        keys = current_keys()

        def compute(x: Tensor) -> Tensor:
            with dropout_keys(keys):
                return self.block(x, **settings)

        kept = (self.number + 1) * NUMBERS_PER_ACTIVATION * x.nbytes <= self.memory_bytes
        if kept or not torch.is_grad_enabled():
            return compute(x)
        # Dropout goes by keys, so there is no random state to restore.
        return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)


class Anatomy(NamedTuple):
    """The parts of a vision transformer that methods change: its blocks, the norm before them, and the width of a token."""

    blocks: Any
    norm_pre: nn.Module
    width: int


class ImageTowerView(nn.Module):
    """A view of a vision transformer, open_clip's own or timm's (as in BiomedCLIP).

    Raises:
        UserError: the image tower is no vision transformer.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = view(tower)
        blocks = self._anatomy.blocks
        for place, block in enumerate(blocks):
            if isinstance(block, ResidualAttentionBlock):
                block.attn = SelfAttention(block.attn)
            blocks[place] = Block(block, place)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks, in order."""
        return list(self._anatomy.blocks)

    @property
    def width(self) -> int:
        """The size of a token."""
        return self._anatomy.width

    @property
    def _anatomy(self) -> Anatomy:
        trunk = self.tower.trunk if isinstance(self.tower, TimmModel) else self.tower
        if isinstance(trunk, VisionTransformer):
            return Anatomy(trunk.transformer.resblocks, trunk.ln_pre, trunk.transformer.width)
        if isinstance(trunk, TimmVisionTransformer):
            return Anatomy(trunk.blocks, trunk.norm_pre, trunk.embed_dim)
        raise UserError(
            f"backbone: the method changes the blocks of a vision transformer, but this image tower is a "
            f"{type(trunk).__name__}; use a ViT"
        )

    def forward(self, pixels: Tensor, prompts: Sequence[Tensor] = (), keys: Tensor | None = None) -> Tensor:
        """Un-normalised features [B, d] of pixels [B, 3, H, W].

        Args:
            prompts: J times [M, width]. The first stand after the patches, without positions, and go through the norm that comes
                before the blocks; the others replace them before blocks 1 to J - 1.
            keys: [B] int64, of dropout in the parts that were added.
        """
        changes = [(self._anatomy.norm_pre, append(prompts[0]))] if prompts else []
        changes += [(block, replace_last(deep)) for block, deep in zip(self.blocks[1:], prompts[1:], strict=False)]
        with dropout_keys(keys), changed_inputs(changes):
            return cast(Tensor, self.tower(pixels))


def check_depth(depth: int, *towers: ImageTowerView | TextTower) -> None:
    """Raises UserError: a tower has fewer blocks than are to have prompts."""
    blocks = min(len(tower.blocks) for tower in towers)
    if depth > blocks:
        raise UserError(
            f"method.depth: {depth} blocks are to have prompts, but a tower of this backbone has {blocks} in all; "
            f"use method.depth={blocks} or less"
        )


class TowerViews(nn.Module):
    """Views of both towers, in evaluation mode as the frozen towers are.

    Learned parts that a method adds are modules of the method, which a view calls but does not hold: ZeRO-3 gathers each view as
    a whole (`vipbench.harness.models.backbone.READ_IN_PIECES`), and does not reduce gradients of parameters inside it correctly.
    """

    def __init__(self, image: nn.Module, text: TextTower) -> None:
        super().__init__()
        self.image, self.text = ImageTowerView(image), view(text)

    def train(self, mode: bool = True) -> "TowerViews":
        return super().train(False) if self.training else self  # as Backbone.train
