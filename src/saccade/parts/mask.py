"""Masks in one dimension: which pairs exist by position; `algebra` joins them.

Legend: i is a query position, j a key position, True means that i may read j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.algebra import (
    And,
    Interval,
    Mask,
    Pairs,
    Span,
    clip,
    static_exist,
)
from saccade.parts.base import arg


@dataclass(frozen=True)
class Causal(Mask):
    """A query reads its own key and earlier ones."""

    name = "causal"
    joins = "and"
    gives = frozenset({"key order"})
    looks_back = True
    shift_invariant = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(0, i1, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(torch.zeros_like(i), i + 1)]


@dataclass(frozen=True)
class Window(Mask):
    """The `width` latest keys, the own one included."""

    width: int = arg(at_least=1)

    name = "window"
    looks_back = True
    shift_invariant = True

    @property
    def horizon(self) -> int:
        return self.width

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - self.width)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(i0 - self.width + 1, i1, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(i + 1 - self.width, i + 1)]


@dataclass(frozen=True)
class Neighborhood(Mask):
    """The `width` keys around the own one, on both sides, `dilation` apart; the width is odd.

    Near a border the window is cut, so a border query reads fewer keys.
    """

    width: int = arg(at_least=1)
    dilation: int = arg(1, at_least=1)

    name = "neighborhood"
    shift_invariant = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2 == 0:
            raise MechanismError(
                f"neighborhood: width must be odd, so that both sides are alike, got {self.width}; "
                f"use {self.width - 1} or {self.width + 1}, or window({self.width}) for the latest keys only"
            )

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        gap = (i - j).abs()
        near = gap <= (self.width // 2) * self.dilation
        return near & (gap % self.dilation == 0) if self.dilation > 1 else near

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        side = (self.width // 2) * self.dilation
        return clip(i0 - side, i1 + side, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        side = self.width // 2
        return [(i - side, i + side + 1)] if self.dilation == 1 else None


@dataclass(frozen=True)
class Dilated(Mask):
    """The `width` latest keys of those `step` apart, the own one included."""

    width: int = arg(at_least=1)
    step: int = arg(2, at_least=1)

    name = "dilated"
    looks_back = True
    shift_invariant = True

    @property
    def horizon(self) -> int:
        return (self.width - 1) * self.step + 1

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        gap = i - j
        return (gap >= 0) & (gap < self.width * self.step) & (gap % self.step == 0)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(i0 - (self.width - 1) * self.step, i1, keys)


@dataclass(frozen=True)
class Strided(Mask):
    """All keys a multiple of `step` back, the own one included (Child et al., Sparse Transformers, 2019)."""

    step: int = arg(at_least=1)

    name = "strided"
    looks_back = True
    shift_invariant = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j) % self.step == 0)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(0, i1, keys)


@dataclass(frozen=True)
class Chunk(Mask):
    """Keys of the query's own block of `size` tokens, later ones included."""

    size: int = arg(at_least=1)

    name = "chunk"

    def uniform(self, i0: int, i1: int) -> bool:
        return i0 // self.size == (i1 - 1) // self.size

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.div(i, self.size, rounding_mode="floor") == torch.div(
            j, self.size, rounding_mode="floor"
        )

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(i0 // self.size * self.size, -(-i1 // self.size) * self.size, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        first = torch.div(i, self.size, rounding_mode="floor") * self.size
        return [(first, first + self.size)]


@dataclass(frozen=True)
class Sink(Mask):
    """The first `count` keys, readable by every query (Xiao et al., Efficient Streaming Language Models, 2023)."""

    first: int = arg(4, at_least=1)

    name = "sink"

    def uniform(self, i0: int, i1: int) -> bool:
        return True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (j < self.first) & (i > -1)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(0, self.first, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(torch.zeros_like(i), torch.where(i < 0, 0, self.first))]


@dataclass(frozen=True)
class Global(Mask):
    """The first `tokens` read every key and are read by every query (Beltagy et al., Longformer, 2020)."""

    tokens: int = arg(1, at_least=1)

    name = "global"

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return (j < self.tokens) | (i < self.tokens)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(0, keys if i0 < self.tokens else self.tokens, keys)

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(torch.zeros_like(i), torch.where(i < self.tokens, keys, self.tokens))]


def rows_exist(pairs: Pairs, i: Tensor, j: Tensor, i0: int, i1: int) -> Tensor:
    """`static_exist` for rows i (Q, 1) from i0 to i1; one row (1, K) where all of them surely read the same keys."""
    terms = pairs.parts if isinstance(pairs, And) else (pairs,)
    rest = [t for t in terms if not isinstance(t, Causal)]
    if not all(isinstance(leaf, Mask) and leaf.uniform(i0, i1) for t in rest for leaf in t.leaves()):
        return static_exist(pairs, i, j)
    out = torch.ones_like(j, dtype=torch.bool)
    for t in rest:
        out = out & static_exist(t, i[:1], j)
    return out & (j <= i) if len(rest) < len(terms) and bool((j > i0).any()) else out
