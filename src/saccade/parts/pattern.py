"""Static patterns beyond windows: documents, prefixes, blocks by power and by head, a window in shuffled order.

Legend: i is a query position, j a key position, B the size of a block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.algebra import Interval, Mask, Pairs, Span, clip, merge_spans
from saccade.parts.base import arg


@dataclass(frozen=True)
class Document(Mask):
    """A token reads its own document: `lengths` of documents that stand one after another; all tokens beyond are one more.

    The same for every sample of a batch; documents that differ between samples are a `mask` of the call.
    """

    lengths: tuple[int, ...] = arg(at_least=1)

    name = "document"
    joins = "and"

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each document ends."""
        return tuple(itertools.accumulate(self.lengths))

    def uniform(self, i0: int, i1: int) -> bool:
        return not any(i0 < e < i1 for e in self.ends)

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        ends = torch.tensor(self.ends, device=i.device)
        return torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        lo = max((e for e in self.ends if e <= i0), default=0)
        return clip(lo, min((e for e in self.ends if e >= i1), default=keys), keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        bounds = torch.tensor((0, *self.ends, max(keys, self.ends[-1])), device=i.device)
        own = torch.bucketize(i, bounds[1:-1], right=True)
        return [(bounds[own], bounds[own + 1])]


@dataclass(frozen=True)
class Prefix(Mask):
    """The first `tokens` read each other on both sides, all others themselves and what stands before them.

    (Raffel et al., Exploring the Limits of Transfer Learning, 2020: the prefix language model.)
    """

    tokens: int = arg(at_least=1)

    name = "prefix"
    joins = "and"

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) | (j < self.tokens)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(0, max(i1, self.tokens), keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(torch.zeros_like(i), (i + 1).clamp(min=self.tokens))]


@dataclass(frozen=True)
class Every(Mask):
    """Every `step`-th key, from the key `first` on, for all queries."""

    step: int = arg(at_least=1)
    first: int = arg(0, at_least=0)

    name = "every"

    def uniform(self, i0: int, i1: int) -> bool:
        return True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return ((j - self.first) % self.step == 0) & (j >= self.first) & (i > -1)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(self.first, keys, keys)


@dataclass(frozen=True)
class HeadStride(Mask):
    """Head h reads every `step`-th key from the key h mod step on (Huang et al., Efficient Attentions for Long Documents, 2021)."""

    step: int = arg(4, at_least=1)

    name = "head_stride"
    by_head = True

    def at(self, head: int, heads: int) -> Pairs:
        if self.step > heads:
            raise MechanismError(
                f"head_stride: {heads} heads leave keys that none reads at a step of {self.step}; take at most {heads}"
            )
        return Every(self.step, head % self.step)


@dataclass(frozen=True)
class LocalBlocks(Mask):
    """The query's own block of `block` tokens, whole, and the blocks just before it, `last` in all."""

    block: int = arg(64, at_least=1)
    last: int = arg(1, at_least=1)

    name = "local_blocks"

    def uniform(self, i0: int, i1: int) -> bool:
        return i0 // self.block == (i1 - 1) // self.block

    @property
    def grain(self) -> int:
        """Rows that read the same keys come in runs of so many."""
        return self.block

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        gap = i // self.block - j // self.block
        return (gap >= 0) & (gap < self.last)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip((i0 // self.block - self.last + 1) * self.block, -(-i1 // self.block) * self.block, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        own = torch.div(i, self.block, rounding_mode="floor")
        return [((own + 1 - self.last) * self.block, (own + 1) * self.block)]


@dataclass(frozen=True)
class PowerBlocks(Mask):
    """The blocks 1, 2, 4, 8, ... blocks before the own one (Chen et al., PowerAttention, 2025)."""

    block: int = arg(64, at_least=1)

    name = "power_blocks"
    looks_back = True

    def uniform(self, i0: int, i1: int) -> bool:
        return i0 // self.block == (i1 - 1) // self.block

    @property
    def grain(self) -> int:
        """Rows that read the same keys come in runs of so many."""
        return self.block

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        gap = i // self.block - j // self.block
        return (gap > 0) & ((gap & (gap - 1)) == 0)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        found = []
        for own in range(i0 // self.block, -(-i1 // self.block)):
            gaps = (1 << p for p in range(own.bit_length()))
            found += [
                ((own - g) * self.block, min(keys, (own - g + 1) * self.block)) for g in gaps if g <= own
            ]
        return merge_spans(found)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        own = torch.div(i, self.block, rounding_mode="floor")
        gaps = [1 << p for p in range(int(own.max()).bit_length() if own.numel() else 0)]
        return [((own - g) * self.block, torch.where(own < g, 0, (own - g + 1) * self.block)) for g in gaps]


@dataclass(frozen=True)
class Stripes(Mask):
    """Every `every`-th block of keys, those with (block number + shift) mod every = 0, for all queries."""

    block: int = arg(64, at_least=1)
    every: int = arg(8, at_least=1)
    shift: int = arg(0, at_least=0)

    name = "stripes"

    def uniform(self, i0: int, i1: int) -> bool:
        return True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return ((j // self.block + self.shift) % self.every == 0) & (i > -1)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        first = -self.shift % self.every
        blocks = range(first, -(-keys // self.block), self.every)
        return merge_spans([(n * self.block, min(keys, (n + 1) * self.block)) for n in blocks])


@dataclass(frozen=True)
class HeadStripes(Mask):
    """Stripes that differ between heads, shifted by `step` blocks from one to the next.

    `share` heads in a row have the same: give the query heads of a key-value head, so that what they never read can be freed.
    (Lin et al., Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads, 2024.)
    """

    block: int = arg(64, at_least=1)
    every: int = arg(8, at_least=1)
    step: int = arg(1, at_least=0)
    share: int = arg(1, at_least=1)

    name = "head_stripes"
    by_head = True

    def at(self, head: int, heads: int) -> Pairs:
        return Stripes(self.block, self.every, head // self.share * self.step % self.every)


@dataclass(frozen=True)
class Permuted(Mask):
    """The `width` nearest keys in a shuffled order, the own one in the middle; the width is odd.

    The order is a keyed permutation of each `length` positions in a row, so it is known for any number of tokens and
    decoding goes on. (Stochastic Attention: Connectome-Inspired Randomized Routing, 2026.)
    """

    width: int = arg(at_least=1)
    length: int = arg(4096, at_least=1)
    seed: int = arg(0, at_least=0)

    name = "permuted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2 == 0:
            raise MechanismError(
                f"permuted: width must be odd, so that both sides are alike, got {self.width}; "
                f"use {self.width - 1} or {self.width + 1}"
            )

    def place(self, i: Tensor) -> Tensor:
        """Where positions stand in the shuffled order."""
        run = i // self.length
        return run * self.length + shuffled(i % self.length, run, self.length, self.seed)

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (self.place(i) - self.place(j)).abs() <= self.width // 2


ROUNDS, MIX, WORD = 4, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), (1 << 32) - 1


def shuffled(x: Tensor, run: Tensor, length: int, seed: int) -> Tensor:
    """A permutation of 0..length-1 keyed by `seed` and `run`: a Feistel network over a power of four, walked until inside."""
    half = max(1, -(-(length - 1).bit_length() // 2))
    mask, key = (1 << half) - 1, (run * MIX[0] + (seed * MIX[1] & WORD)) & WORD
    found, inside = x, torch.zeros_like(x, dtype=torch.bool)
    while not bool(inside.all()):
        left, right = found >> half, found & mask
        for n in range(ROUNDS):
            word = (right * MIX[2] + key + n * MIX[0]) & WORD
            word = ((word ^ (word >> 15)) * MIX[1]) & WORD
            left, right = right, left ^ ((word ^ (word >> 13)) & mask)
        found = torch.where(inside, found, (left << half) | right)
        inside = found < length
    return found
