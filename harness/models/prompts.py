"""Prompts of ragged length with places for context vectors: token lists in, embeddings for the text tower out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.errors import UserError
from vipbench.harness.models.phrases import spoken
from vipbench.harness.system.devices import to_device

SLOT = -1  # stands for a context vector in a list of tokens
CONTEXT_STD = 0.02  # of a random start, as in CoOp and ViP


class TokenEmbedding(Protocol):
    """The part of a text tower that prompts are made with; see `vipbench.harness.models.text_tower.TextTower`."""

    width: int
    context_length: int
    start: list[int]
    end: list[int]
    pad: int
    pads_to_context_length: bool

    @property
    def device(self) -> torch.device:
        """The device of the tower's weights."""

    def tokenize(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end tokens."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings without positions: [P, L] int64 -> [P, L, w]."""


@dataclass(frozen=True)
class Filled:
    """Embeddings of prompts that are put together when they are read: those of thousands of prompts take more than all else.

    Attributes:
        table: [U, w] embeddings of the tokens that occur, zero for a slot.
        tokens: [P, L] int64, rows of the table.
        slots: [P, M] int64, positions of the slots.
        context: [n, M, w], the vectors for them, each n-th for P / n consecutive prompts.
    """

    table: Tensor
    tokens: Tensor
    slots: Tensor
    context: Tensor

    def embeddings(self) -> Tensor:
        """Token embeddings [P, L, w] with the context in the slots; the gradient reaches it."""
        n, each = len(self.context), len(self.tokens) // len(self.context)
        embedded = F.embedding(self.tokens, self.table.to(self.context.dtype))
        index = self.slots.view(n, each, -1, 1).expand(-1, -1, -1, embedded.shape[-1])
        values = self.context[:, None].expand(index.shape)
        return embedded.view(n, each, *embedded.shape[1:]).scatter(2, index, values).flatten(0, 1)

    def split(self, sizes: list[int]) -> "list[Filled]":
        """Parts of so many prompts each, in order: each of some whole n-ths, or within one."""
        each = len(self.tokens) // len(self.context)
        if all(size % each == 0 for size in sizes):
            contexts = self.context.split([size // each for size in sizes])
        else:
            nths, firsts = self.context.split(1), accumulate([0, *sizes[:-1]])
            contexts = tuple(nths[first // each] for first in firsts)
        parts = zip(self.tokens.split(sizes), self.slots.split(sizes), contexts, strict=True)
        return [Filled(self.table, *part) for part in parts]


@dataclass(frozen=True)
class Prompts:
    """P prompts as a text tower reads them, in G groups of as many consecutive ones.

    Attributes:
        source: [P, L, w] token embeddings without positions, or what they are made from.
        lengths: [P] int64, on the CPU: the tokens of each prompt; what comes after is padding.
        groups: G.
        shared: how many positions in front are the same in all prompts of a group.
        deep: D times [M, w]: vectors that replace what stands in the slots before blocks 1 to D.
        slots: [P, M] int64, on the CPU: the positions of the slots; needed where there are deep vectors.
        keys: [P] int64 of dropout inside the tower (harness/models/stateless_dropout.py), with nothing shared; None: no dropout.
    """

    source: Tensor | Filled
    lengths: Tensor
    groups: int = 1
    shared: int = 0
    deep: tuple[Tensor, ...] = ()
    slots: Tensor | None = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def embeddings(self) -> Tensor:
        """Token embeddings [P, L, w] without positions, made anew where they are not stored."""
        return self.source if isinstance(self.source, Tensor) else self.source.embeddings()

    def put_together(self) -> "Prompts":
        """The same prompts with their embeddings stored."""
        return replace(self, source=self.embeddings)

    @property
    def requires_grad(self) -> bool:
        return (self.source if isinstance(self.source, Tensor) else self.source.context).requires_grad

    def lengths_on(self, device: torch.device) -> Tensor:
        """The lengths [P] int64 on a device; with packed_text's layouts all that crosses from the CPU as prompts are encoded."""
        return _numbers_on(self.lengths.numpy().tobytes(), device)

    def with_deep(self, block: int, x: Tensor) -> Tensor:
        """The input [P, L, w] of a block with the deep vectors for it in the slots."""
        if not 1 <= block <= len(self.deep):
            return x
        assert self.slots is not None
        slots = _numbers_on(self.slots.numpy().tobytes(), x.device).view(*self.slots.shape, 1)
        index = slots.expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, self.deep[block - 1].to(x.dtype).expand(index.shape))

    def split(self, size: int) -> "list[Prompts]":
        """Parts of about `size` prompts, in order: some whole groups each, or where one group is larger, parts of groups."""
        each = len(self) // self.groups
        whole = size // each
        bounds = (
            range(0, len(self), whole * each)
            if whole
            else [first for group in range(self.groups) for first in range(group * each, (group + 1) * each, size)]
        )
        sizes = [end - first for first, end in pairwise([*bounds, len(self)])]
        pieces = zip(bounds, sizes, self.source.split(sizes), strict=True)
        return [self._part(first, size, source, max(1, size // each)) for first, size, source in pieces]

    def _part(self, first: int, size: int, source: Tensor | Filled, groups: int) -> "Prompts":
        rows = slice(first, first + size)
        return replace(
            self,
            source=source,
            lengths=self.lengths[rows],
            groups=groups,
            slots=None if self.slots is None else self.slots[rows],
            keys=None if self.keys is None else self.keys[rows],
        )

    @staticmethod
    def concatenate(parts: "Sequence[Prompts]") -> "Prompts":
        """Prompts of several equal kinds (same P / G, shared positions and L), one after the other."""
        first, embeddings = parts[0], [part.embeddings for part in parts]
        kinds = {
            (len(part) // part.groups, part.shared, own.shape[1:]) for part, own in zip(parts, embeddings, strict=True)
        }
        assert len(kinds) == 1, f"prompts of different kinds: {kinds}"
        assert not any(part.deep or part.keys is not None for part in parts), (
            "runs that change the tower are not packed"
        )
        lengths = torch.cat([part.lengths for part in parts])
        return Prompts(torch.cat(embeddings), lengths, sum(part.groups for part in parts), first.shared)


# A step's lengths and slots are those of the step before; a copy from the CPU waits for what the device still computes.
@lru_cache(maxsize=64)
def _numbers_on(numbers: bytes, device: torch.device) -> Tensor:
    return to_device(torch.frombuffer(bytearray(numbers), dtype=torch.int64), device)


class PromptBatch(nn.Module):
    """P prompts, each with M slots that context vectors fill; everything else is the tower's frozen token embedding.

    Args:
        tower: the text tower that will read the prompts.
        prompts: P lists of token numbers without start and end tokens; M entries of each are `SLOT`.
        names: P descriptions for error messages, such as "class 'nevus', symptom 'round'".

    Raises:
        UserError: a prompt does not fit the tower's context length (names it).
    """

    table: Tensor  # [U, w] float32, embeddings of the tokens that occur, zero for a slot
    tokens: Tensor  # [P, L] int64, rows of the table
    slots: Tensor  # [P, M] int64, positions of the slots in order

    def __init__(self, tower: TokenEmbedding, prompts: Sequence[list[int]], names: Sequence[str]) -> None:
        super().__init__()
        rows = [[*tower.start, *prompt, *tower.end] for prompt in prompts]
        for row, name in zip(rows, names, strict=True):
            if len(row) > tower.context_length:
                raise UserError(
                    f"{name}: {len(row)} tokens with start, end and {row.count(SLOT)} context vectors, but the text tower "
                    f"takes {tower.context_length}; shorten it"
                )
        width = tower.context_length if tower.pads_to_context_length else max(len(row) for row in rows)
        # Which positions are slots is found on the CPU, where the tokens are; then all goes to the tower's device once.
        tokens = torch.tensor([row + [tower.pad] * (width - len(row)) for row in rows], device="cpu")
        self.slots_on_cpu = (tokens == SLOT).nonzero()[:, 1].view(len(rows), -1)
        occurring, places = tokens.unique(return_inverse=True)
        with torch.no_grad():
            table = tower.embed(to_device(occurring.clamp(min=0), tower.device)).float()
        table.masked_fill_(to_device(occurring == SLOT, tower.device)[:, None], 0.0)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("tokens", to_device(places, tower.device), persistent=False)
        self.register_buffer("slots", to_device(self.slots_on_cpu, tower.device), persistent=False)
        self.lengths = torch.tensor([len(row) for row in rows], device="cpu")
        self.shared = _shared_front(rows)
        self.shared_words = _shared_front([row[: row.index(SLOT)] if SLOT in row else row for row in rows], whole=True)

    @property
    def embeddings(self) -> Tensor:
        """Token embeddings [P, L, w] float32, zero in the slots."""
        return F.embedding(self.tokens, self.table)

    def fixed(self, keys: Tensor | None = None) -> Prompts:
        """The prompts of texts without slots; with keys [P] int64 the tower's dropout is that of each prompt alone."""
        source = Filled(self.table, self.tokens, self.slots, self.table.new_zeros(1, 0, self.table.shape[1]))
        return Prompts(source, self.lengths, shared=self.shared if keys is None else 0, keys=keys)

    def fill(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Prompts:
        """Put context vectors into the slots; the gradient reaches them.

        Args:
            context: [P, M, w], or [1, M, w] to share the vectors among all prompts.
            deep: vectors [M, w] of all prompts that replace what stands in the slots before blocks 1, 2 and so on.
        """
        filled = Filled(self.table, self.tokens, self.slots, context)
        shared = self.shared if len(context) == 1 else min(self.shared, self.shared_words)
        return Prompts(filled, self.lengths, shared=shared, deep=tuple(deep), slots=self.slots_on_cpu)

    def fill_each(self, contexts: Tensor) -> Prompts:
        """All prompts once for each of B contexts [B, M, w]: B groups of P prompts, each with one context."""
        count = len(contexts)
        filled = Filled(self.table, self.tokens.repeat(count, 1), self.slots.repeat(count, 1), contexts)
        return Prompts(filled, self.lengths.repeat(count), groups=count, shared=self.shared)


def _shared_front(rows: Sequence[Sequence[int]], whole: bool = False) -> int:
    """Count the entries in front that are the same in all rows; unless `whole`, the last entry of a row is never one of them."""
    shortest = min(len(row) for row in rows) - (0 if whole else 1)
    same = [len({row[place] for row in rows}) == 1 for place in range(shortest)]
    return 0 if len(rows) == 1 else (same.index(False) if False in same else shortest)


def context_prompt(tower: TokenEmbedding, name: str, context_length: int, position: str = "end") -> list[int]:
    """Tokens of "<context> name." with the class token position of CoOp (arXiv 2109.01134, section 3.2).

    Args:
        name: class name or symptom; underscores read as spaces.
        context_length: M, the number of slots.
        position: where `name` stands: "end" (after the slots), "middle" (between two halves) or "front".
    """
    text = spoken(name)
    if position == "end":
        return [SLOT] * context_length + tower.tokenize(f"{text}.")
    body, stop = tower.tokenize(text), tower.tokenize(".")
    before = context_length // 2 if position == "middle" else 0
    return [SLOT] * before + body + [SLOT] * (context_length - before) + stop


def context_vectors(tower: TokenEmbedding, words: str | None, length: int | None, copies: int = 1) -> nn.Parameter:
    """Learned context [copies, M, w]: M = `length` draws N(0, 0.02), or the embeddings of `words`.

    With words, M is their token count; with a length too, they are the last ones of so many vectors, behind zeros.

    Raises:
        UserError: the words have more tokens than `length`.
    """
    if words is None:
        assert length is not None
        return nn.Parameter(torch.randn(copies, length, tower.width, device="cpu") * CONTEXT_STD)  # the CPU's generator
    tokens = tower.tokenize(spoken(words))
    front = 0 if length is None else length - len(tokens)
    if front < 0:
        raise UserError(
            f"method.context_length: {length} vectors are fewer than the {len(tokens)} tokens of init_words {words!r}"
        )
    with torch.no_grad():
        embedded = tower.embed(to_device(torch.tensor([tokens], device="cpu"), tower.device)).float()
        return nn.Parameter(nn.functional.pad(embedded, (0, 0, front, 0)).repeat(copies, 1, 1))
