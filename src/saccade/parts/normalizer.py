"""How a row of logits becomes weights, and how partial results over key subsets merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.parts.base import Part

if TYPE_CHECKING:
    from saccade.parts.pair import Tile

Partial = tuple[Tensor, Tensor]


class Normalizer(Part):
    """Logits of a row to weights; owns its partial result."""

    kind = "normalizer"
    temporaries: ClassVar[int] = 0  # numbers a pair that it holds besides logits and weights

    @property
    def has_lse(self) -> bool:
        """True when weights are shares exp(s - lse), so that partial results merge by their lse."""
        return "exp" in self.gives

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, Tensor | None]:
        """Weights in the shape of s, zeros where s is -inf, and the log-denominator or None.

        s (b, h, Q, K) holds whole rows; `t` is their tile, for normalisers that learn.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Normalizer):
    """w = exp(s) / sum exp(s). A partial result is (out, lse)."""

    name = "softmax"
    gives = frozenset({"exp", "denominator", "positive"})

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, Tensor]:
        empty = torch.isneginf(s.detach()).all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        lse = torch.logsumexp(s, dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)
        return torch.softmax(s, dim=-1).masked_fill(empty, 0.0), lse


def merge(parts: Iterable[Partial]) -> Partial:
    """Join softmax results over disjoint key sets.

    Each part is `(out, lse)`: out (..., L, E), lse (..., L). An empty part has lse = -inf and may hold anything
    finite in out. Any order and any grouping give the same result up to rounding; statistics are float32 or wider.
    Returns `(out, lse)` with out in the dtype of the first part. Raises ValueError when there is no part or the
    shapes differ. (Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, 2021.)

    >>> a, b = torch.ones(1, 2), torch.zeros(1, 2)
    >>> out, lse = merge([(a, torch.zeros(1)), (b, torch.zeros(1))])
    >>> out.tolist(), round(lse.item(), 4)
    ([[0.5, 0.5]], 0.6931)
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge needs at least one (out, lse) part, got none")
    first = parts[0][0]
    for out, lse in parts:
        if out.shape != first.shape or lse.shape != first.shape[:-1]:
            raise ValueError(
                f"merge takes parts (out, lse) of shapes {tuple(first.shape)} and {tuple(first.shape[:-1])}; "
                f"got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    wide = torch.promote_types(first.dtype, torch.float32)
    lses = torch.stack([lse.to(wide) for _, lse in parts])
    empty = torch.isneginf(lses.detach().amax(0))
    base = torch.logsumexp(lses.masked_fill(empty, 0.0), dim=0).masked_fill(empty, 0.0)
    total = base.masked_fill(empty, -torch.inf)
    shares = torch.exp(lses - base).unsqueeze(-1)
    acc = torch.zeros(first.shape, dtype=wide, device=first.device)
    for share, (out, _) in zip(shares, parts, strict=True):
        acc = acc + share * out.to(wide)
    return acc.to(first.dtype), total
