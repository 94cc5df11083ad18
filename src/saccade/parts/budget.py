"""How many of the candidates a choice keeps, given their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.base import Part, arg

Kept = tuple[Tensor, Tensor]


class Budget(Part):
    """What is kept of scored candidates; -inf marks what is no candidate."""

    kind = "budget"

    def most(self, units: int) -> int:
        """The most that is ever kept of so many candidates."""
        return units

    def keep(self, scores: Tensor) -> Kept:
        """Indices (..., T) and which of them count, from logits (..., U)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Top(Budget):
    """The `count` best; a whole number stands for it."""

    count: int = arg(4, at_least=1)

    name = "top"

    def most(self, units: int) -> int:
        return min(self.count, units)

    def keep(self, scores: Tensor) -> Kept:
        best, found = scores.topk(self.most(scores.shape[-1]), dim=-1, sorted=False)
        return found, ~torch.isneginf(best)


@dataclass(frozen=True)
class Share(Budget):
    """The best `share` of the candidates, rounded up."""

    share: float = arg(0.25, above=0.0)

    name = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share > 1:
            raise MechanismError(f"share: a share is at most 1, got {self.share:g}; use top(n) for a count")

    def most(self, units: int) -> int:
        return math.ceil(round(self.share * units, 9))

    def keep(self, scores: Tensor) -> Kept:
        best, found = scores.topk(self.most(scores.shape[-1]), dim=-1)
        open_ = (~torch.isneginf(scores)).sum(-1, keepdim=True)
        count = torch.ceil((self.share * open_.double()).mul(1e9).round().div(1e9))
        rank = torch.arange(best.shape[-1], device=scores.device)
        return found, (rank < count) & ~torch.isneginf(best)


@dataclass(frozen=True)
class Mass(Budget):
    """The fewest best whose softmax sums to at least `mass`, and at least `least` of them (Holtzman et al., 2020: top-p)."""

    mass: float = arg(0.9, above=0.0)
    least: int = arg(1, at_least=1)

    name = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mass > 1:
            raise MechanismError(f"mass: a share of the softmax is at most 1, got {self.mass:g}")

    def keep(self, scores: Tensor) -> Kept:
        best, found = scores.sort(dim=-1, descending=True, stable=True)
        share = torch.softmax(best, dim=-1)
        before = share.cumsum(-1) - share
        rank = torch.arange(best.shape[-1], device=scores.device)
        kept = (rank < self.least) | (before < self.mass - 1e-6)
        if self.mass == 1:
            kept = torch.ones_like(kept)
        return found, kept & ~torch.isneginf(best)


@dataclass(frozen=True)
class Above(Budget):
    """Those whose softmax share is at least `threshold`."""

    threshold: float = arg(0.01, at_least=0.0)

    name = "above"

    def keep(self, scores: Tensor) -> Kept:
        kept = (torch.softmax(scores, dim=-1) >= self.threshold) & ~torch.isneginf(scores)
        found = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        return found, kept


@dataclass(frozen=True)
class Apart(Budget):
    """What `keep_each` says of the first `first` candidates, and the same of the others."""

    first: int = arg(1, at_least=1)
    keep_each: Budget = Share()

    name = "apart"

    def most(self, units: int) -> int:
        first = min(self.first, units)
        return sum(self.keep_each.most(n) for n in (first, units - first) if n)

    def keep(self, scores: Tensor) -> Kept:
        sides = [s for s in (scores[..., : self.first], scores[..., self.first :]) if s.shape[-1]]
        found = [self.keep_each.keep(s) for s in sides]
        index = [x + side * self.first for side, (x, _) in enumerate(found)]
        return torch.cat(index, -1), torch.cat([kept for _, kept in found], -1)


def budget(keep: int | Budget) -> Budget:
    """A budget; a whole number n stands for top(n)."""
    return Top(keep) if isinstance(keep, int) else keep
