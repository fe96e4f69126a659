"""Prompts of ragged length with places for context vectors: token lists in, embeddings for the text tower out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.backbone import TextTower

SLOT = -1  # stands for a context vector in a list of tokens
CONTEXT_STD = 0.02  # of a random start, as in CoOp and ViP


class PromptBatch(nn.Module):
    """P prompts, each with M slots that context vectors fill; everything else is the tower's frozen token embedding.

    Args:
        tower: the text tower that will read the prompts.
        prompts: P lists of token numbers without start and end tokens; M entries of each are `SLOT`.
        names: P descriptions for error messages, such as "class 'nevus', symptom 'round'".

    Raises:
        UserError: a prompt does not fit the tower's context length (names it).
    """

    embeddings: Tensor  # [P, L, w] float32, zero in the slots
    slots: Tensor  # [P, M] int64, positions of the slots in order
    lengths: Tensor  # [P] int64, tokens of each prompt with start and end

    def __init__(self, tower: "TextTower", prompts: Sequence[list[int]], names: Sequence[str]) -> None:
        super().__init__()
        rows = [[*tower.start, *prompt, *tower.end] for prompt in prompts]
        for row, name in zip(rows, names, strict=True):
            if len(row) > tower.context_length:
                raise UserError(
                    f"{name}: {len(row)} tokens with start, end and {row.count(SLOT)} context vectors, but the text tower "
                    f"takes {tower.context_length}; shorten it"
                )
        width = tower.context_length if tower.pads_to_context_length else max(len(row) for row in rows)
        tokens = torch.tensor([row + [tower.pad] * (width - len(row)) for row in rows], device=tower.device)
        is_slot = tokens == SLOT
        with torch.no_grad():
            embeddings = tower.embed(tokens.clamp(min=0)).float()
        embeddings[is_slot] = 0.0
        slots = is_slot.nonzero()[:, 1].view(len(rows), -1)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("lengths", torch.tensor([len(row) for row in rows], device=tower.device), persistent=False)

    def fill(self, context: Tensor, rows: Tensor | None = None) -> Tensor:
        """Put context vectors into the slots.

        Args:
            context: [P, M, w], or [1, M, w] to share the vectors among all prompts.
            rows: [N] int64, which prompt each entry of a [N, M, w] `context` goes into; default: each prompt once.

        Returns:
            [P or N, L, w] embeddings in the context's dtype; the gradient reaches `context`.
        """
        embeddings, slots = self.embeddings, self.slots
        if rows is not None:
            embeddings, slots = embeddings[rows], slots[rows]
        index = slots[..., None].expand(-1, -1, embeddings.shape[-1])
        return embeddings.to(context.dtype).scatter(1, index, context.expand(*index.shape))


def context_prompt(tower: "TextTower", name: str, context_length: int, position: str = "end") -> list[int]:
    """Tokens of "<context> name." with the class token position of CoOp (arXiv 2109.01134, section 3.2).

    Args:
        name: class name or symptom; underscores read as spaces.
        context_length: M, the number of slots.
        position: where `name` stands: "end" (after the slots), "middle" (between two halves) or "front".
    """
    text = name.replace("_", " ")
    if position == "end":
        return [SLOT] * context_length + tower.tokenize(f"{text}.")
    body, stop = tower.tokenize(text), tower.tokenize(".")
    before = context_length // 2 if position == "middle" else 0
    return [SLOT] * before + body + [SLOT] * (context_length - before) + stop


def context_vectors(tower: "TextTower", words: str | None, length: int, copies: int = 1) -> nn.Parameter:
    """Learned context [copies, M, w]: the embeddings of `words` (M is their token count), or M = `length` draws N(0, 0.02)."""
    if words is None:
        return nn.Parameter(torch.randn(copies, length, tower.width) * CONTEXT_STD)
    with torch.no_grad():
        tokens = torch.tensor([tower.tokenize(words.replace("_", " "))], device=tower.device)
        return nn.Parameter(tower.embed(tokens).float().repeat(copies, 1, 1))
