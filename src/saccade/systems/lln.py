"""Exponential features whose rates give their log-weights the spread of softmax's."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism, Mix, Pairwise, Recurrent, system
from saccade.mechanism import causal as causal_form
from saccade.parts.base import Sizes
from saccade.parts.feature import Feature
from saccade.parts.mask import Chunk
from saccade.parts.memory import RowRatio

QUERIES, KEYS, CLOSE = 2048, 1024, 1e-4


@functools.lru_cache(maxsize=8)
def _draws(d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, d, generator=generator) for n in (QUERIES, KEYS))
    return q, k


def spread(s: float, d: int) -> float:
    """The variance of log-weights where alpha q and beta k have the deviation s / sqrt(2), on normal draws."""
    q, k = (torch.exp(x * s * 0.5**0.5 - x.amax(-1, keepdim=True) * s * 0.5**0.5) for x in _draws(d))
    top = _draws(d)[1].amax(-1) * s * 0.5**0.5
    return float((torch.log(q @ k.mT) + top).log_softmax(-1).var())


def softmax_spread(variance: float, d: int) -> float:
    """The variance of softmax's log-weights where logits have a variance, on the same draws."""
    q, k = _draws(d)
    return float((q @ k.mT * (variance / d) ** 0.5).log_softmax(-1).var())


@functools.lru_cache(maxsize=1024)
def matching(variance: float, d: int) -> float:
    """The s that spreads log-weights as softmax does where var(q) var(k) is `variance`, by false position inside a bracket."""
    wanted = softmax_spread(variance, d)
    low, high = (0.0, -wanted), (1.0, spread(1.0, d) - wanted)
    while high[1] < 0:
        low, high = high, (2 * high[0], spread(2 * high[0], d) - wanted)
    while high[0] - low[0] > CLOSE * high[0]:
        share = -low[1] / (high[1] - low[1])
        middle = low[0] + min(0.9, max(0.1, share)) * (high[0] - low[0])
        off = spread(middle, d) - wanted
        if abs(off) <= CLOSE * wanted:
            return middle
        low, high = ((middle, off), high) if off < 0 else (low, (middle, off))
    return high[0]


@dataclass(frozen=True)
class ExpFeature(Feature):
    """phi(q) = exp(alpha q) and phi(k) = exp(beta k), channel by channel.

    The buffer `rates` (key-value heads, 2) holds alpha and beta. It starts right for unit variances; `refresh` sets
    alpha = s / (sqrt(2) std q) and beta = s / (sqrt(2) std k), with the s whose log-weights vary as softmax's do
    on normal q and k of these deviations. (Nahshan et al., Linear Log-Normal Attention with Unbiased Concentration, 2024.)
    """

    name = "exp_feature"
    buffer_names = ("rates",)
    needs = frozenset({"ratio"})
    gives = frozenset({"denominator", "positive"})

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"rates": torch.full((sizes.kv_heads, 2), matching(1.0, sizes.head_dim) * 0.5**0.5)}

    def refresh(
        self,
        buffers: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        rates = []
        for head in range(k.shape[1]):
            group = q.shape[1] // k.shape[1]
            queries, keys = q[:, head * group : (head + 1) * group].transpose(1, 2), k[:, head]
            if valid is not None:
                queries = queries[valid] if q.shape[2] == k.shape[2] else queries
                keys = keys[valid]
            std_q, std_k = (float(x.double().std()) for x in (queries, keys))
            if not (std_q > 0 and std_k > 0 and math.isfinite(std_q * std_k)):
                raise ValueError(
                    f"exp_feature: rates are fitted to q and k that vary, got deviations {std_q:g} and {std_k:g}"
                )
            s = matching(float(f"{(std_q * std_k) ** 2:.4g}"), q.shape[-1])
            rates.append([s / (2**0.5 * std_q), s / (2**0.5 * std_k)])
        return {"rates": torch.tensor(rates, device=k.device)}

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        rates = buffers["rates"].to(x.dtype)
        if rates.dim() != 2 or rates.shape[1] != 2 or x.shape[1] % rates.shape[0]:
            raise NotSupported(
                f"exp_feature needs a buffer `rates` (key-value heads, 2), got {tuple(rates.shape)} for {x.shape[1]} heads"
            )
        rate = rates[:, 0 if side == "q" else 1].repeat_interleave(x.shape[1] // rates.shape[0])
        exponent = x * rate[:, None, None]
        scale = exponent.detach().amax(-1)
        return torch.exp(exponent - scale.unsqueeze(-1)), scale


@system("lln_attention", ref="S176")
def lln_attention(block: int | None = None, causal: bool = False) -> Mechanism:
    """exp(alpha q).exp(beta k) with rates that match softmax's spread; with `block` the mean of it and softmax in blocks.

    (Nahshan et al., Linear Log-Normal Attention with Unbiased Concentration, 2024: LLN, and LLN+Diag.)
    """
    m: Mechanism = Recurrent(feature=ExpFeature(), ratio=RowRatio())
    if block is not None:
        m = Mix((m, Pairwise(pairs=Chunk(block))))
    return causal_form(m) if causal else m
