"""A policy that foresees queries: the attention that a key will receive, if later queries are like those that were read.

Legend: b batch, g key-value heads, r query heads a key-value head, n keys, d channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.evict import shared
from saccade.cache.moments import turned
from saccade.cache.policy import Policy, Sight
from saccade.errors import MechanismError

SLAB = 1024


def log_expected(k: Tensor, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
    """log E exp(q.k / sqrt d) of keys (..., n, d) for normal q with mean (..., d) and covariance (..., d, d), (..., n)."""
    d = k.shape[-1]
    linear = (k @ mean.unsqueeze(-1)).squeeze(-1) / math.sqrt(d)
    if covariance is None:
        return linear
    return linear + ((k @ covariance) * k).sum(-1) / (2 * d)


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Keys that the next `ahead` queries are expected to weigh most, times the norm of their values.

    Queries are taken for normal, with mean and covariance of those read after the first `sink`, turned by the mean rotation of
    the next `ahead` positions. A key is worth (a + eps) |v|, a its share of the expected weights beyond the first `sink` keys, the
    mean of the query heads that share it; `covariance` and `values` False leave these out. With `floor` below 1 the heads of a layer share a budget, of
    which that part is each head's own. (Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution, 2025.)
    """

    ahead: int = 512
    eps: float = 0.0
    covariance: bool = True
    values: bool = True
    floor: float = 1.0

    name = "expected_attention"
    moments = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 1 or self.eps < 0 or not 0 <= self.floor <= 1:
            raise MechanismError(
                "expected_attention: ahead is at least 1, eps at least 0 and floor a share of 0 to 1, got "
                f"ahead={self.ahead}, eps={self.eps:g} and floor={self.floor:g}"
            )

    def budget(self, sight: Sight) -> Tensor:
        own = super().budget(sight)
        return own if self.floor == 1 else shared(self, sight, own, self.floor)

    def scores(self, sight: Sight) -> Tensor:
        found = sight.moments
        if found is None or found.seen is None:
            raise MechanismError(
                "expected_attention needs the queries of all tokens: LayerCache.observe(q) after each append"
            )
        b, g, _, d = sight.k.shape
        mean, covariance = found.mean, found.covariance if self.covariance else None
        if found.rotation is not None:
            turn = found.rotation.ahead(sight.length, self.ahead)
            mean = turned(mean, turn)
            if covariance is not None:
                covariance = turned(turned(covariance, turn).transpose(-1, -2), turn)
        mean = mean.view(b, g, -1, d)
        covariance = None if covariance is None else covariance.view(b, g, -1, d, d)
        k = sight.k.float().masked_fill(~sight.there.unsqueeze(-1), 0).unsqueeze(2)
        z = torch.cat([log_expected(some, mean, covariance) for some in k.split(SLAB, 3)], -1)
        ranked = sight.there & (sight.there.cumsum(-1) > self.sink)
        worth = z.masked_fill(~ranked.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
        return (worth + self.eps) * sight.v.float().norm(dim=-1) if self.values else worth
