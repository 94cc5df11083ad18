"""Whether small norms of keys foretell attention: what a policy that scores by norm takes for granted.

Legend: b batch, g key-value heads, h query heads, n keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.cache.policy import Policy, Sight

LEAST_RHO = 0.2
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Premise:
    """Rank correlation `rho` (layers, g) of small key norms with attention received, and the `spread` (layers, g) of norms.

    A spread is the standard deviation as a share of the mean; below 0.01 the norms are all alike and rho is 0.
    """

    rho: Tensor
    spread: Tensor

    @property
    def alike(self) -> Tensor:
        """Heads whose keys have all the same norm (layers, g)."""
        return self.spread < LEAST_SPREAD

    @property
    def mean(self) -> float:
        """The mean correlation of all heads."""
        return float(self.rho.mean())

    @property
    def holds(self) -> bool:
        """True where the mean correlation is above 0.2."""
        return self.mean > LEAST_RHO

    def __str__(self) -> str:
        layers = ", ".join(f"{n}: {float(x):.2f}" for n, x in enumerate(self.rho.mean(1)))
        verdict = "holds" if self.holds else "fails: choose by snapkv, tova or h2o instead"
        alike = f"; {int(self.alike.sum())} of {self.alike.numel()} heads have norms all alike"
        return (
            f"rank correlation of small key norms with attention received, by layer {layers}; mean {self.mean:.2f}, more than "
            f"{LEAST_RHO} wanted{alike if self.alike.any() else ''}: the premise of l2_norm {verdict}"
        )


@dataclass(frozen=True)
class Probe(Policy):
    """Keeps all, and notes how norms and attention go together in each layer."""

    keep: float | int = 1.0
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    mass = True

    def scores(self, sight: Sight) -> Tensor:
        assert sight.mass is not None
        seen = sight.there.cumsum(-1)
        share = torch.where(sight.there, 1 / seen.clamp_min(1), 0.0)
        uniform = share.flip(-1).cumsum(-1).flip(-1)
        norms = sight.k.float().norm(dim=-1)
        width = spread(norms, sight.there)
        rho = rank_correlation(-norms, sight.mass / uniform.clamp_min(1e-9), sight.there)
        self.found[sight.layer] = rho.where(width >= LEAST_SPREAD, 0.0).mean(0), width.mean(0)
        return norms

    def report(self) -> Premise:
        """What was found in all layers."""
        rho, width = zip(*(self.found[n] for n in sorted(self.found)), strict=True)
        return Premise(torch.stack(rho).cpu(), torch.stack(width).cpu())


def spread(x: Tensor, there: Tensor) -> Tensor:
    """The standard deviation of each row of x (..., n) where `there` is True, as a share of its mean, (...)."""
    count = there.sum(-1).clamp_min(1)
    mean = x.masked_fill(~there, 0).sum(-1) / count
    variance = (x - mean.unsqueeze(-1)).masked_fill(~there, 0).square().sum(-1) / count
    return variance.sqrt() / mean.clamp_min(torch.finfo(x.dtype).tiny)


def rank_correlation(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    """Spearman's rho of x and y (..., n), row by row where `there` is True, (...); 0 for rows of fewer than two."""
    found = []
    for a, b, held in zip(*(t.flatten(0, -2) for t in (x, y, there)), strict=True):
        n = int(held.sum())
        ranks = [t[held].argsort().argsort().double() - (n - 1) / 2 for t in (a, b)]
        found.append((ranks[0] @ ranks[1]) / max(1.0, n * (n * n - 1) / 12))
    return torch.stack(found).view(x.shape[:-1]).float()


def premise(layers: Sequence[tuple[Tensor, Tensor]]) -> Premise:
    """Whether small norms of keys foretell attention, from queries (b, h, n, d) and keys (b, g, n, d) of every layer.

    Attention received is the causal softmax weight of a key over all queries and heads, as a multiple of what it would be if
    every query read all keys alike. `saccade.hf.premise` asks a model of transformers.
    """
    from saccade.cache.layer import LayerCache

    if not layers:
        raise ValueError("premise takes queries and keys of at least one layer, got none")
    probe = Probe()
    for number, (q, k) in enumerate(layers):
        if q.shape[2] != k.shape[2] or q.shape[2] < 2:
            raise ValueError(
                f"premise takes queries and keys of the same text of at least two tokens, got {q.shape[2]} and {k.shape[2]}"
            )
        cache = LayerCache(probe, number, len(layers))
        cache.append(k, k)
        cache.observe(q)
        cache.compress(q)
    return probe.report()
