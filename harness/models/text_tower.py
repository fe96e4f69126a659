"""Text towers: frozen, reading token embeddings, so that learned vectors can stand among them.

Two kinds: open_clip's own text transformer (of `CLIP` and `CustomTextCLIP`), and a Hugging Face tower inside `CustomTextCLIP` (as
BiomedCLIP has). Sizes: d is the joint embedding size, w the text tower's width; they differ in several models.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vipbench.harness.errors import UserError
from vipbench.harness.models.deep_prompts import changed_inputs
from vipbench.harness.models.open_clip_internals import (
    CLIP,
    CustomTextCLIP,
    HFTextEncoder,
    HFTokenizer,
    TextTransformer,
)
from vipbench.harness.models.packed_text import encode_eot, supports
from vipbench.harness.models.prompts import PromptBatch, Prompts
from vipbench.harness.models.stateless_dropout import dropout_keys

UNTRUNCATED = 4096  # tokens: longer than any text that a tower takes, so that a text that is too long is seen
TEXTS_PER_PASS = 1024
# Memory that autograd keeps of a token, per block and unit of width: about ten fp32 numbers, as the tests measure.
BYTES_PER_ACTIVATION = 48


class TextTower(nn.Module):
    """A frozen text tower that reads token embeddings.

    Attributes:
        width: w, the size of a token embedding.
        context_length: the most tokens that a prompt may have, start and end included.
        start, end: the special tokens around every text.
        pad: the token that fills up short prompts.
        pads_to_context_length: True where padding takes part in attention, so that it must be what the model saw.
        layers: number of blocks.
        memory_bytes: about how much the activations of one pass may take.
        learns: whether parts that are learned were added to its blocks, as they may be to those of a view.
        forward_override: what encodes prompts instead, while several runs share a pass (harness/training/packing.py).
    """

    width: int
    context_length: int
    layers: int
    memory_bytes: int = 2 * 2**30
    learns: bool = False
    forward_override: Callable[[Prompts], Tensor] | None = None
    pads_to_context_length = False

    def __init__(self, tokenizer: Any, pad: int) -> None:
        super().__init__()
        self.tokenizer, self.pad = tokenizer, pad
        # Start tokens are those that "" and "a" have in common in front; end tokens are the rest of "".
        empty, letter = self._ids(""), self._ids("a")
        shared = [left == right for left, right in zip(empty, letter, strict=False)]
        self.start = empty[: shared.index(False) if False in shared else len(shared)]
        self.end = empty[len(self.start) :]

    @property
    def special_tokens(self) -> int:
        """Count of a prompt's tokens that are start and end tokens."""
        return len(self.start) + len(self.end)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end tokens, never truncated."""
        ids = self._ids(text)
        return ids[len(self.start) : len(ids) - len(self.end)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings without positions: [P, L] int64 -> [P, L, w]."""
        raise NotImplementedError

    def encode(self, prompts: Prompts) -> Tensor:
        """`forward` in one pass, keeping what a backward pass needs."""
        raise NotImplementedError

    def forward(self, prompts: Prompts) -> Tensor:
        """Un-normalised text features [P, d] of prompts.

        More prompts than `memory_bytes` allows for go through in parts, whose activations are computed again in the backward
        pass, so that memory is that of one part.
        """
        return self.forward_override(prompts) if self.forward_override else self.compute(prompts)

    def compute(self, prompts: Prompts) -> Tensor:
        """`forward`, here and now."""
        trained = torch.is_grad_enabled() and (self.learns or prompts.embeddings.requires_grad)
        bytes_per_prompt = self.bytes_per_token * int(prompts.lengths.max()) / (1 if trained else self.layers)
        size = max(1, int(self.memory_bytes / bytes_per_prompt))
        if size >= len(prompts):
            return self.encode(prompts)
        parts = prompts.split(size)
        if trained:
            return torch.cat([checkpoint(self.encode, part, use_reentrant=False) for part in parts])
        return torch.cat([self.encode(part) for part in parts])

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order."""
        raise NotImplementedError

    def changed(self, prompts: Prompts) -> ExitStack:
        """Have the blocks take the deep vectors of prompts, and what was added to them drop features by their keys."""
        stack = ExitStack()
        stack.enter_context(dropout_keys(prompts.keys))
        if prompts.deep:
            changes = [(block, partial(prompts.with_deep, number)) for number, block in enumerate(self.blocks)]
            stack.enter_context(changed_inputs(changes))
        return stack

    @property
    def bytes_per_token(self) -> int:
        """Estimate of the memory that a token's activations take until the backward pass."""
        return self.layers * self.width * BYTES_PER_ACTIVATION

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], names: Sequence[str] | None = None) -> Tensor:
        """Un-normalised features [P, d] (float32) of P texts; `names` describe them in the error for one that is too long."""
        names = names or [f"text {text!r}" for text in texts]
        tokens = [self.tokenize(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))  # so that a pass is of about one length
        features: dict[int, Tensor] = {}
        for first in range(0, len(texts), TEXTS_PER_PASS):
            chosen = order[first : first + TEXTS_PER_PASS]
            batch = PromptBatch(self, [tokens[place] for place in chosen], [names[place] for place in chosen])
            encoded = self(batch.fixed())
            features |= dict(zip(chosen, encoded.float(), strict=True))
        return torch.stack([features[place] for place in range(len(texts))])

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError


class ClipTextTower(TextTower):
    """The text side of open_clip's `CLIP`, or its `TextTransformer`, from embeddings on."""

    def __init__(self, text: Any, pool_type: str, tokenizer: Any) -> None:
        self.eot = getattr(tokenizer, "eot_token_id", None)
        padding = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        super().__init__(tokenizer, padding)
        if getattr(text, "cls_emb", None) is not None:
            raise UserError(
                "backbone: a text tower with an appended class embedding (CoCa) is not supported; use a CLIP"
            )
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self.pool_type = pool_type
        self.width = self.token_embedding.embedding_dim
        self.context_length = self.positional_embedding.shape[0]
        # A causal tower cannot see what comes after its end token. Elsewhere padding is part of the input.
        self.pads_to_context_length = text.attn_mask is None or pool_type == "last"
        self.packs = text.attn_mask is not None and pool_type in ("argmax", "eos") and supports(text.transformer)
        self.layers = len(text.transformer.resblocks)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.resblocks)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens)

    def encode(self, prompts: Prompts) -> Tensor:
        if self.packs:
            return self._project(
                self.ln_final(encode_eot(self.transformer.resblocks, prompts, self.positional_embedding))
            )
        length = prompts.embeddings.shape[1]
        x = prompts.embeddings + self.positional_embedding[:length]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        with self.changed(prompts):
            x = self.ln_final(self.transformer(x, attn_mask=mask))
        if self.pool_type == "first":
            return self._project(x[:, 0])
        if self.pool_type == "last":
            return self._project(x[:, -1])
        # "argmax" and "eos" both point at the end token
        return self._project(x[torch.arange(len(x), device=x.device), prompts.lengths_on(x.device) - 1])

    def _project(self, x: Tensor) -> Tensor:
        if self.text_projection is None:
            return x
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection

    def _ids(self, text: str) -> list[int]:
        if self.eot is None:
            return _ids(self.tokenizer, text, self.pad)
        ids = self.tokenizer([text], context_length=UNTRUNCATED)[0].tolist()
        return ids[: ids.index(self.eot) + 1]  # open_clip's own tokenizer pads with 0, which is also a token


class HuggingFaceTextTower(TextTower):
    """open_clip's `HFTextEncoder` (BERT and relatives): bidirectional, padding masked, its own pooling and projection."""

    def __init__(self, text: HFTextEncoder, tokenizer: Any) -> None:
        super().__init__(tokenizer, text.config.pad_token_id)
        self.transformer, self.pooler, self.proj = text.transformer, text.pooler, text.proj
        self.width = self.transformer.get_input_embeddings().embedding_dim
        self.layers = text.config.num_hidden_layers
        self.context_length = min(tokenizer.context_length, text.context_length or tokenizer.context_length)
        # transformers makes such a mask [P, 1, L, L] of one [P, L], but asks the device first if anything is padded.
        self.takes_square_mask = (
            hasattr(self.transformer, "_create_attention_masks") and text.config._attn_implementation == "sdpa"
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order.

        Raises:
            UserError: it is built in another way than BERT.
        """
        layers = getattr(getattr(self.transformer, "encoder", None), "layer", None)
        if layers is None:
            kind = type(self.transformer).__name__
            raise UserError(
                f"backbone: the method changes the blocks of a text tower, and those of a {kind} are not known"
            )
        return list(layers)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.transformer.get_input_embeddings()(tokens)

    def encode(self, prompts: Prompts) -> Tensor:
        longest = int(prompts.lengths.max())
        lengths = prompts.lengths_on(prompts.embeddings.device)
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        attended: Tensor | None = mask.long()
        if self.takes_square_mask:
            padded = int(prompts.lengths.min()) < longest
            attended = mask[:, None, None].expand(-1, 1, longest, -1) if padded else None
        with self.changed(prompts):
            output = self.transformer(inputs_embeds=prompts.embeddings[:, :longest], attention_mask=attended)
        return self.proj(self.pooler(output, mask.long()))

    def _ids(self, text: str) -> list[int]:
        return _ids(self.tokenizer, text, self.pad)


def text_tower(model: CLIP | CustomTextCLIP, tokenizer: Any) -> TextTower:
    if isinstance(model, CLIP):
        return ClipTextTower(model, model.text_pool_type, tokenizer)
    if isinstance(model.text, TextTransformer):
        return ClipTextTower(model.text, model.text.pool_type, tokenizer)
    return HuggingFaceTextTower(model.text, tokenizer)


def _ids(tokenizer: Any, text: str, pad: int) -> list[int]:
    """Token numbers of a text with start and end tokens, without padding."""
    plain = isinstance(tokenizer, HFTokenizer) and not (tokenizer.tokenizer_mode or tokenizer.strip_sep_token)
    if plain:  # called without padding, since an end token may be the padding token too
        return list(tokenizer.tokenizer(tokenizer.clean_fn(text), verbose=False).input_ids)
    ids = tokenizer([text], context_length=UNTRUNCATED)[0].tolist()
    while ids and ids[-1] == pad:
        ids.pop()
    return ids
