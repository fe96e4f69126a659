"""A causal text transformer on prompts of ragged length: no padding, what prompts share in front once, no more than is needed.

The same numbers as open_clip's own forward pass, by its own weights. Tokens of all prompts lie in one list; positions that a
group of prompts shares in front (start token, shared context vectors) are in it once per group, and their keys and values serve
every prompt of the group. The last block computes the end tokens only, since no other output is read.

Blocks may be those of a view with LoRA (harness/models/lora.py), and prompts may have deep vectors in their slots.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.models.open_clip_internals import ResidualAttentionBlock
from vipbench.harness.models.prompts import Prompts
from vipbench.harness.models.stateless_dropout import dropout_keys, split_keys
from vipbench.harness.system.devices import to_device


@dataclass(frozen=True)
class Layout:
    """The layout of the tokens of P prompts in G groups: the shared prefix of each group (S), then the suffix of each prompt.

    Attributes:
        groups, shared: G and S.
        longest: most tokens of a suffix.
        source: [T] int64, places of the suffixes' tokens among the P * L positions of the prompts.
        places: [T] int64, the same among P * longest, or None where every prompt has as many.
        ends: [P] int64, each prompt's last token in the list of all tokens.
        causal: [longest, S + longest] bool, what the tokens of a suffix attend to.
        until_end: [P, 1, 1, S + longest] bool, what each last token attends to.
    """

    groups: int
    shared: int
    longest: int
    source: Tensor
    places: Tensor | None
    ends: Tensor
    causal: Tensor
    until_end: Tensor


def supports(transformer: Any) -> bool:
    """Return True if a text transformer has open_clip's plain blocks, which are what is computed here."""
    blocks = getattr(transformer, "resblocks", [])
    return len(blocks) > 0 and all(
        type(block) is ResidualAttentionBlock and block.attn.in_proj_weight is not None and block.attn.bias_k is None
        for block in blocks
    )


def encode_eot(blocks: nn.ModuleList, prompts: Prompts, positions: Tensor) -> Tensor:
    """The output of a causal transformer at each prompt's last token: [P, w].

    Args:
        positions: [at least L, w] positional embedding.
    """
    length = prompts.embeddings.shape[1]
    lengths = prompts.lengths.numpy().tobytes()
    layout = _layout(lengths, length, prompts.groups, prompts.shared, positions.device)
    tokens = _packed(prompts.embeddings + positions[:length], layout)
    keys = None
    if prompts.keys is not None:
        assert not prompts.shared, "tokens that prompts share would be dropped for all of them alike"
        keys = _packed(split_keys(prompts.keys, length), layout)
    with dropout_keys(keys):
        for number, block in enumerate(blocks):
            if 1 <= number <= len(prompts.deep):
                assert prompts.slots is not None
                places, vectors = _slot_places(
                    prompts.slots.numpy().tobytes(), lengths, prompts.groups, prompts.shared, positions.device
                )
                deep = prompts.deep[number - 1].to(tokens.dtype).index_select(0, vectors)
                tokens = tokens.index_copy(0, places, deep)
            tokens = _block(block, tokens, layout, eot_only=number == len(blocks) - 1)
    return tokens


def _packed(values: Tensor, layout: Layout) -> Tensor:
    """[P, L, ...] of prompts -> [N, ...] of the tokens in their list."""
    prefix = values.view(layout.groups, -1, *values.shape[1:])[:, 0, : layout.shared].flatten(0, 1)
    return torch.cat([prefix, values.flatten(0, 1).index_select(0, layout.source)])


def _block(block: Any, tokens: Tensor, layout: Layout, eot_only: bool) -> Tensor:
    normed = block.ln_1(tokens)
    attention = _eot_attention if eot_only else _attention
    tokens = tokens.index_select(0, layout.ends) if eot_only else tokens
    tokens = tokens + block.ls_1(block.attn.out_proj(attention(block.attn, normed, layout)))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def _attention(attn: Any, tokens: Tensor, layout: Layout) -> Tensor:
    """Causal attention of every token within its prompt: [N, w] -> [N, w]."""
    qkv = F.linear(tokens, attn.in_proj_weight, attn.in_proj_bias)
    if update := getattr(attn, "update", None):
        qkv = qkv + update(tokens)
    qkv = qkv.view(len(tokens), 3, attn.num_heads, -1)
    prefix, suffix = _prefix(qkv, layout), _padded(qkv[layout.groups * layout.shared :], layout)
    outputs = []
    if layout.shared:
        q, k, v = prefix.unbind(0)
        outputs.append(_flat(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    q, k, v = suffix.unbind(0)
    k, v = _after_prefix(prefix[1], k, layout), _after_prefix(prefix[2], v, layout)
    padded = _flat(F.scaled_dot_product_attention(q, k, v, attn_mask=layout.causal))
    outputs.append(padded if layout.places is None else padded.index_select(0, layout.places))
    return torch.cat(outputs) if layout.shared else outputs[0]


def _eot_attention(attn: Any, tokens: Tensor, layout: Layout) -> Tensor:
    """Attention of each prompt's last token: [N, w] -> [P, w]."""
    width = tokens.shape[1]
    bias = attn.in_proj_bias
    queries = F.linear(
        tokens.index_select(0, layout.ends), attn.in_proj_weight[:width], None if bias is None else bias[:width]
    )
    kv = F.linear(tokens, attn.in_proj_weight[width:], None if bias is None else bias[width:])
    if update := getattr(attn, "update", None):
        added = update(tokens)
        queries, kv = queries + added[:, :width].index_select(0, layout.ends), kv + added[:, width:]
    kv = kv.view(len(tokens), 2, attn.num_heads, -1)
    prefix, suffix = _prefix(kv, layout), _padded(kv[layout.groups * layout.shared :], layout)
    k, v = (_after_prefix(prefix[index], suffix[index], layout) for index in (0, 1))
    q = queries.view(len(queries), attn.num_heads, 1, -1)
    return _flat(F.scaled_dot_product_attention(q, k, v, attn_mask=layout.until_end))


def _prefix(values: Tensor, layout: Layout) -> Tensor:
    """[N, n, h, e] -> those of the shared tokens [n, G, h, S, e]."""
    prefix = values[: layout.groups * layout.shared]
    return prefix.view(layout.groups, layout.shared, *values.shape[1:]).permute(2, 0, 3, 1, 4)


def _padded(suffix: Tensor, layout: Layout) -> Tensor:
    """[T, n, h, e] -> [n, P, h, longest, e], zero after a prompt's last token."""
    prompts = len(layout.ends)
    if layout.places is not None:
        suffix = suffix.new_zeros(prompts * layout.longest, *suffix.shape[1:]).index_copy(0, layout.places, suffix)
    return suffix.view(prompts, layout.longest, *suffix.shape[1:]).permute(2, 0, 3, 1, 4)


def _after_prefix(prefix: Tensor, suffix: Tensor, layout: Layout) -> Tensor:
    """Keys or values of a group's shared tokens [G, h, S, e] before those of each prompt [P, h, longest, e]."""
    if not layout.shared:
        return suffix
    each = len(suffix) // layout.groups
    return torch.cat([prefix[:, None].expand(-1, each, -1, -1, -1).flatten(0, 1), suffix], dim=2)


def _flat(x: Tensor) -> Tensor:
    """[B, h, L, e] -> [B * L, h * e]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


@lru_cache(maxsize=64)  # a training step's layout is that of the step before; the copies to the device are made once
def _layout(lengths_bytes: bytes, length: int, groups: int, shared: int, device: torch.device) -> Layout:
    lengths = torch.frombuffer(bytearray(lengths_bytes), dtype=torch.int64)
    suffix, rows = lengths - shared, torch.arange(len(lengths), device="cpu")
    assert suffix.min() > 0, "every prompt has a token in its suffix"
    longest = int(suffix.max())
    row = rows.repeat_interleave(suffix)
    column = torch.arange(len(row), device="cpu") - (suffix.cumsum(0) - suffix).repeat_interleave(suffix)
    columns = torch.arange(shared + longest, device="cpu")
    ragged = len(row) < len(lengths) * longest
    return Layout(
        groups=groups,
        shared=shared,
        longest=longest,
        source=to_device(row * length + shared + column, device),
        places=to_device(row * longest + column, device) if ragged else None,
        ends=to_device(groups * shared + suffix.cumsum(0) - 1, device),
        causal=to_device(columns <= shared + columns[:longest, None], device),
        until_end=to_device((columns < lengths[:, None])[:, None, None], device),
    )


@lru_cache(maxsize=64)
def _slot_places(
    slots_bytes: bytes, lengths_bytes: bytes, groups: int, shared: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Find the slots of all prompts in the list of tokens [D] int64, each place once, and which vector stands there [D]."""
    lengths = torch.frombuffer(bytearray(lengths_bytes), dtype=torch.int64)
    slots = torch.frombuffer(bytearray(slots_bytes), dtype=torch.int64).view(len(lengths), -1)
    suffix, rows = lengths - shared, torch.arange(len(lengths), device="cpu")[:, None]
    each = len(lengths) // groups
    in_prefix = slots < shared
    suffix_places = groups * shared + (suffix.cumsum(0) - suffix)[:, None] + slots - shared
    places = torch.where(in_prefix, rows // each * shared + slots, suffix_places)
    once = ~in_prefix | (rows % each == 0)
    vectors = torch.arange(slots.shape[1], device="cpu").expand_as(slots)
    return to_device(places[once], device), to_device(vectors[once], device)
