"""How one query and one key give a logit.

`prepare` works on tokens, in O(length); `tile` compares prepared rows with prepared keys. A factored score is
exactly a dot product of what `prepare` returns, so that any dot kernel can run it.
Legend: b batch, h query heads, g key-value heads, Q x K one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.parts.base import Part, Sizes, Weight, arg

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


def grouped_matmul(x_bhQm: Tensor, y_bgmK: Tensor) -> Tensor:
    """Matrix products of h heads with g shared ones; the query heads of a group become rows, nothing is expanded."""
    b, h, rows, m = x_bhQm.shape
    g = y_bgmK.shape[1]
    if h == g:
        return x_bhQm @ y_bgmK
    return (x_bhQm.reshape(b, g, h // g * rows, m) @ y_bgmK).view(b, h, rows, y_bgmK.shape[-1])


class Score(Part):
    """A comparison of a query with a key."""

    kind = "score"
    factored: ClassVar[bool] = False

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        """Token-level work: the queries (b, h, L, d) and keys (b, g, S, d) of `c` to what `tile` compares."""
        return c.q, c.k

    def tile(self, t: Tile) -> Tensor:
        """Logits (b, h, Q, K) of prepared rows and keys."""
        return grouped_matmul(t.q, t.k.transpose(-1, -2))

    def pair_flops(self, head_dim: int) -> int:
        """Matrix FLOPs of one pair."""
        return 2 * head_dim

    def token_flops(self, head_dim: int) -> tuple[int, int]:
        """Matrix FLOPs of `prepare`, a query and a key."""
        return 0, 0

    def temporaries(self, head_dim: int) -> int:
        """Numbers a pair that `tile` holds besides the logit."""
        return 0


@dataclass(frozen=True)
class Dot(Score):
    """s = scale q.k; the scale is 1/sqrt(head_dim) unless given (Vaswani et al., Attention Is All You Need, 2017)."""

    scale: float | None = arg(None, above=0.0)

    name = "dot"
    factored = True
    gives = frozenset({"bilinear"})

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        return c.q * (self.scale or 1 / math.sqrt(c.q.shape[-1])), c.k


@dataclass(frozen=True)
class Bilinear(Score):
    """s = q W k with one learned W a head (Luong et al., Effective Approaches, 2015: `general`)."""

    name = "bilinear"
    factored = True
    gives = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"bilinear": Weight((sizes.heads, sizes.head_dim, sizes.head_dim), init="eye")}

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        return c.q @ c.params["bilinear"].to(c.q.dtype), c.k

    def token_flops(self, head_dim: int) -> tuple[int, int]:
        return 2 * head_dim * head_dim, 0


@dataclass(frozen=True)
class Additive(Score):
    """s = v.tanh(Wq q + Wk k), `hidden` wide (Bahdanau et al., 2014; Luong et al., 2015: `concat`)."""

    hidden: int = arg(32, at_least=1)

    name = "additive"
    gives = frozenset({"additive"})
    breaks = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        std = 1 / math.sqrt(sizes.head_dim)
        return {
            "additive_q": Weight((sizes.heads, sizes.head_dim, self.hidden), std=std),
            "additive_k": Weight((sizes.kv_heads, sizes.head_dim, self.hidden), std=std),
            "additive_v": Weight((sizes.heads, self.hidden), std=1 / math.sqrt(self.hidden)),
        }

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        return c.q @ c.params["additive_q"].to(c.q.dtype), c.k @ c.params["additive_k"].to(c.k.dtype)

    def tile(self, t: Tile) -> Tensor:
        b, h, rows, a = t.q.shape
        g = t.k.shape[1]
        grouped = t.q.reshape(b, g, h // g * rows, 1, a) + t.k[:, :, None]
        hidden = torch.tanh(grouped).view(b, h, rows, t.k.shape[2], a)
        return torch.einsum("bhqka,ha->bhqk", hidden, t.params["additive_v"].to(hidden.dtype))

    def pair_flops(self, head_dim: int) -> int:
        return 2 * self.hidden

    def token_flops(self, head_dim: int) -> tuple[int, int]:
        return 2 * head_dim * self.hidden, 2 * head_dim * self.hidden

    def temporaries(self, head_dim: int) -> int:
        return 2 * self.hidden


@dataclass(frozen=True)
class Uniform(Score):
    """s = 0: all keys of a row weigh alike, so that softmax is their mean."""

    name = "uniform"
    factored = True

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        return c.q * 0, c.k
