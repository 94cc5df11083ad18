"""The algebra that joins masks and selections.

A limit (`causal`) intersects with the rest; an allowance (`window`, `sink`, ...) unites with the others.
Legend: i is a query position, j a key position, True means that i may read j.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saccade.parts.base import Part

Span = tuple[int, int]
Interval = tuple[Tensor, Tensor]


class Pairs(Part):
    """An expression over pairs: masks by position and selections by content, joined with & and |."""

    kind = "pairs"
    joins: ClassVar[Literal["and", "or"]] = "or"
    looks_back: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    by_head: ClassVar[bool] = False

    def __and__(self, other: Pairs) -> Pairs:
        if isinstance(self, Full) or isinstance(other, Full):
            return other if isinstance(self, Full) else self
        return _joined(And, self, other)

    def __or__(self, other: Pairs) -> Pairs:
        if isinstance(self, Full) or isinstance(other, Full):
            return Full()
        return _joined(Or, self, other)

    def leaves(self) -> tuple[Pairs, ...]:
        """The atoms of the expression, in order."""
        return (self,)

    def at(self, head: int, heads: int) -> Pairs:
        """The same for one head of `heads`; it differs between heads where `by_head` says so."""
        return self

    @property
    def horizon(self) -> int | None:
        """How many latest keys, the own one included, a query can ever read; None when unbounded."""
        return None


class Mask(Pairs):
    """Existence by position alone. `exist` is elementwise in i and j."""

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        """Boolean, in the broadcast shape of i (..., Q, 1) and j (..., 1, K)."""
        raise NotImplementedError

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        """Key intervals, ascending and disjoint, that cover all keys that rows [i0, i1) may read."""
        return [(0, keys)]

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        """Key intervals [lo, hi) of each row i, disjoint, that hold just what it reads; None where there is no short list."""
        return None

    def uniform(self, i0: int, i1: int) -> bool:
        """True when rows [i0, i1) surely read the same keys; False also where it is not known."""
        return False

    def whole(self, i0: int, i1: int, lo: int, hi: int) -> bool:
        """True when rows [i0, i1) surely read all keys [lo, hi); False also where it is not known."""
        return False

    def count(self, i0: int, i1: int, keys: int) -> int:
        """How many pairs rows [i0, i1) have, counted by evaluating `exist` on the covered spans."""
        total = 0
        rows = torch.arange(i0, i1)[:, None]
        for lo, hi in self.spans(i0, i1, keys):
            total += int(self.exist(rows, torch.arange(lo, hi)[None, :]).sum())
        return total


@dataclass(frozen=True)
class Full(Mask):
    """Every query reads every key."""

    name = "full"
    joins = "and"
    shift_invariant = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)

    def whole(self, i0: int, i1: int, lo: int, hi: int) -> bool:
        return True

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        return [(torch.zeros_like(i), torch.full_like(i, keys))]


@dataclass(frozen=True)
class Joined(Pairs):
    """An expression over several members."""

    parts: tuple[Pairs, ...] = ()

    def __post_init__(self) -> None:
        pass

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(p.shift_invariant for p in self.parts)

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return any(p.by_head for p in self.parts)

    def at(self, head: int, heads: int) -> Pairs:
        return functools.reduce(
            operator.and_ if isinstance(self, And) else operator.or_,
            (p.at(head, heads) for p in self.parts),
        )

    def leaves(self) -> tuple[Pairs, ...]:
        return tuple(leaf for p in self.parts for leaf in p.leaves())


@dataclass(frozen=True)
class And(Joined):
    """Pairs that every member has."""

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        return any(p.looks_back for p in self.parts)

    @property
    def horizon(self) -> int | None:
        return min((h for p in self.parts if (h := p.horizon) is not None), default=None)

    def __str__(self) -> str:
        return " & ".join(f"({p})" if isinstance(p, Or) else str(p) for p in self.parts)


@dataclass(frozen=True)
class Or(Joined):
    """Pairs that any member has."""

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        return all(p.looks_back for p in self.parts)

    @property
    def horizon(self) -> int | None:
        hs = [p.horizon for p in self.parts]
        return None if None in hs else max(h for h in hs if h is not None)

    def __str__(self) -> str:
        return " | ".join(f"({p})" if isinstance(p, And) else str(p) for p in self.parts)


def _flat(join: type[And] | type[Or], p: Pairs) -> tuple[Pairs, ...]:
    return p.parts if isinstance(p, join) else (p,)


def _joined(join: type[And] | type[Or], a: Pairs, b: Pairs) -> Pairs:
    parts = tuple(dict.fromkeys(_flat(join, a) + _flat(join, b)))
    return parts[0] if len(parts) == 1 else join(parts)


def merge_spans(spans: list[Span]) -> list[Span]:
    """Sorted, disjoint spans with the same cover; empty ones dropped."""
    merged: list[Span] = []
    for lo, hi in sorted(s for s in spans if s[1] > s[0]):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged


def clip(lo: int, hi: int, keys: int) -> list[Span]:
    """One span inside the keys, or none."""
    return merge_spans([(max(0, lo), min(keys, hi))])


def cover(pairs: Pairs, i0: int, i1: int, keys: int) -> list[Span]:
    """Key spans that rows [i0, i1) may read under a whole expression; a selection may read anything."""
    if isinstance(pairs, And):
        out = [(0, keys)]
        for p in pairs.parts:
            inner = cover(p, i0, i1, keys)
            out = [(max(a, c), min(b, d)) for a, b in out for c, d in inner if max(a, c) < min(b, d)]
        return merge_spans(out)
    if isinstance(pairs, Or):
        return merge_spans([s for p in pairs.parts for s in cover(p, i0, i1, keys)])
    return pairs.spans(i0, i1, keys) if isinstance(pairs, Mask) else [(0, keys)]


def whole(pairs: Pairs, i0: int, i1: int, lo: int, hi: int) -> bool:
    """True when rows [i0, i1) surely read all keys [lo, hi), known in closed form; False also where it is not known."""
    if isinstance(pairs, And):
        return all(whole(p, i0, i1, lo, hi) for p in pairs.parts)
    if isinstance(pairs, Or):
        return any(whole(p, i0, i1, lo, hi) for p in pairs.parts)
    return isinstance(pairs, Mask) and pairs.whole(i0, i1, lo, hi)


def static_exist(pairs: Pairs, i: Tensor, j: Tensor) -> Tensor:
    """Existence of an expression that holds masks only."""
    if isinstance(pairs, And | Or):
        terms = [static_exist(p, i, j) for p in pairs.parts]
        out = terms[0]
        for term in terms[1:]:
            out = out & term if isinstance(pairs, And) else out | term
        return out
    assert isinstance(pairs, Mask)
    return pairs.exist(i, j)


def is_static(pairs: Pairs) -> bool:
    """True when position alone decides which pairs exist."""
    return all(isinstance(leaf, Mask) for leaf in pairs.leaves())


def split(pairs: Pairs) -> tuple[Pairs, Pairs | None, tuple[Pairs, ...]] | None:
    """`limit & (allow | select ...)` as (limit, allow, selects), or None when the expression has another form."""
    terms = _flat(And, pairs)
    limits = [t for t in terms if is_static(t)]
    rest = [t for t in terms if not is_static(t)]
    limit: Pairs = Full()
    for t in limits:
        limit = limit & t
    if not rest:
        return limit, None, ()
    if len(rest) > 1:
        return None
    members = _flat(Or, rest[0])
    if any(isinstance(m, And) for m in members):
        return None
    allowed = [m for m in members if isinstance(m, Mask)]
    allow: Pairs | None = None
    for m in allowed:
        allow = m if allow is None else allow | m
    return limit, allow, tuple(m for m in members if not isinstance(m, Mask))
