"""Layers on sets: equivariant blocks, attention through inducing points, pooling by attention.

A set is x (B, n, dim) with an optional mask (B, n), True where an element is real; what padding holds, NaN included,
reaches no result. (Lee et al., Set Transformer: A Framework for Attention-based Permutation-Invariant Neural
Networks, 2019.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism
from saccade.nn.attention import Attention
from saccade.nn.transformer import FeedForward


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Raises where x is no padded set (B, n, dim), or the mask is no boolean (B, n)."""
    if x.dim() != 3:
        raise ValueError(f"a set must be (batch, elements, dim), got shape {tuple(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            f"mask must be boolean {tuple(x.shape[:2])}, True where an element is real, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def cleared(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, n, dim) with zeros where the mask (B, n) says padding."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


class MAB(nn.Module):
    """LN(h + rFF(h)) with h = LN(x + attention(x, y)): x (B, n, dim) reads the set y (B, m, dim); answers (B, n, dim).

    `norm=False` leaves LN out. An empty y leaves x as its own h. A mechanism that looks at positions makes the
    block depend on the order. (Lee et al., Set Transformer, 2019.)
    """

    def __init__(
        self, dim: int, heads: int, mechanism: str | Mechanism = "full", norm: bool = True, ratio: int = 1
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, mechanism)
        self.feed_forward = FeedForward(dim, ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, m) is True where an element of y is real."""
        check_mask(y, mask)
        pairs = None if mask is None else mask[:, None, None]
        h = self.norm1(x + self.attention(x, cleared(y, mask), mask=pairs))
        return self.norm2(h + self.feed_forward(h))


class SAB(nn.Module):
    """Every element reads every other, MAB(x, x): a set (B, n, dim) to a set; O(n^2). (Lee et al., Set Transformer, 2019.)"""

    def __init__(
        self, dim: int, heads: int, mechanism: str | Mechanism = "full", norm: bool = True, ratio: int = 1
    ) -> None:
        super().__init__()
        self.block = MAB(dim, heads, mechanism, norm, ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x and the answer are (B, n, dim); padding answers zeros."""
        check_mask(x, mask)
        x = cleared(x, mask)
        return cleared(self.block(x, x, mask), mask)


class ISAB(nn.Module):
    """MAB(x, MAB(I, x)) with learned inducing points I (inducing, dim): a set to a set in O(n * inducing).

    (Lee et al., Set Transformer, 2019.)

    >>> ISAB(16, heads=2, inducing=4)(torch.zeros(3, 9, 16)).shape
    torch.Size([3, 9, 16])
    """

    def __init__(self, dim: int, heads: int, inducing: int, norm: bool = True, ratio: int = 1) -> None:
        super().__init__()
        if inducing < 1:
            raise ValueError(f"ISAB needs at least one inducing point, got inducing={inducing}")
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inducing, dim)))
        self.read, self.write = (MAB(dim, heads, norm=norm, ratio=ratio) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x and the answer are (B, n, dim); padding answers zeros."""
        check_mask(x, mask)
        x = cleared(x, mask)
        summary = self.read(self.points.expand(len(x), -1, -1), x, mask)
        return cleared(self.write(x, summary), mask)


class PMA(nn.Module):
    """MAB(S, rFF(x)) with learned seeds S (seeds, dim): a set (B, n, dim) to (B, seeds, dim).

    An empty set answers what the seeds are by themselves. (Lee et al., Set Transformer, 2019.)
    """

    def __init__(self, dim: int, heads: int, seeds: int = 1, norm: bool = True, ratio: int = 1) -> None:
        super().__init__()
        if seeds < 1:
            raise ValueError(f"PMA needs at least one seed, got seeds={seeds}")
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(seeds, dim)))
        self.feed_forward = FeedForward(dim, ratio)
        self.block = MAB(dim, heads, norm=norm, ratio=ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, dim) to (B, seeds, dim)."""
        check_mask(x, mask)
        return self.block(self.seeds.expand(len(x), -1, -1), self.feed_forward(cleared(x, mask)), mask)


class SetTransformer(nn.Module):
    """Sets (B, n, features) to answers (B, outputs, width): ISABs, then PMA, one SAB over the seeds, a linear map.

    `inducing=0` encodes by SABs, which look at all pairs. (Lee et al., Set Transformer, 2019.)

    >>> model = SetTransformer(features=2, width=5, outputs=4, dim=16, heads=2)
    >>> model(torch.zeros(3, 9, 2)).shape
    torch.Size([3, 4, 5])
    """

    def __init__(
        self,
        features: int,
        width: int,
        outputs: int = 1,
        dim: int = 64,
        heads: int = 4,
        inducing: int = 16,
        depth: int = 2,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.lift = nn.Linear(features, dim)
        self.encoder = nn.ModuleList(
            ISAB(dim, heads, inducing, norm) if inducing else SAB(dim, heads, norm=norm) for _ in range(depth)
        )
        self.pool = PMA(dim, heads, outputs, norm)
        self.between = SAB(dim, heads, norm=norm)
        self.head = nn.Linear(dim, width)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of every element, (B, n, dim)."""
        check_mask(x, mask)
        x = self.lift(cleared(x, mask))
        for block in self.encoder:
            x = block(x, mask)
        return x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, features), mask (B, n), to (B, outputs, width)."""
        return self.head(self.between(self.pool(self.encode(x, mask), mask)))
