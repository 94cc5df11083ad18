"""A gate that weighs features by Gaussians around their mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

TINY = 1e-8


class GaussianGate(nn.Module):
    """y = x * w along one axis, w proportional to prod_i exp(-(x - mean - delta_i)^2 / (2 var c_i^2)) and of sum one.

    x is (B, L, dim); mean, variance and sum run over `axis`, "tokens" or the "features" of a head. Each head, an equal
    share of the features, has its own offsets delta and widths c, (heads, gaussians), both learned. The same weight
    goes to all where the values do not vary. (Ioannides et al., Gaussian Adaptive Attention is All You Need, 2024.)

    >>> gate = GaussianGate(6, gaussians=2, heads=3)
    >>> gate.weights(torch.randn(2, 5, 6)).sum(1).shape
    torch.Size([2, 6])
    """

    def __init__(
        self,
        dim: int,
        gaussians: int = 1,
        heads: int = 1,
        axis: Literal["tokens", "features"] = "tokens",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if gaussians < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"a Gaussian gate needs a Gaussian, and heads that divide dim; "
                f"got gaussians={gaussians}, heads={heads}, dim={dim}"
            )
        if axis not in ("tokens", "features"):
            raise ValueError(f"axis must be tokens or features, got {axis!r}")
        self.heads, self.axis = heads, axis
        self.delta = nn.Parameter(torch.randn(heads, gaussians, generator=generator))
        self.c = nn.Parameter(torch.ones(heads, gaussians))

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """w (B, L, dim), zeros where the mask (B, L) is False; over tokens, an empty sample has no weight at all."""
        if x.dim() != 3 or x.shape[-1] % self.heads:
            raise ValueError(
                f"x must be (batch, length, dim) with dim a multiple of heads={self.heads}, got {tuple(x.shape)}"
            )
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        if valid.dtype != torch.bool or valid.shape != x.shape[:2]:
            raise ValueError(
                f"mask must be boolean {tuple(x.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
            )
        valid = valid[:, :, None, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(wide).unflatten(-1, (self.heads, -1)).masked_fill(~valid, 0)
        along = 1 if self.axis == "tokens" else 3
        kept = valid.to(wide).expand_as(parts)
        count = kept.sum(along, keepdim=True).clamp_min(1)
        centred = (parts - parts.sum(along, keepdim=True) / count) * kept
        variance = centred.square().sum(along, keepdim=True) / count
        delta, c = (p.to(wide)[..., None, :] for p in (self.delta, self.c))
        spread = variance.clamp_min(TINY)[..., None] * c.square().clamp_min(TINY)
        exponent = -((centred[..., None] - delta).square() / (2 * spread)).sum(-1)
        exponent = exponent.masked_fill(~valid, torch.finfo(wide).min)
        return (torch.softmax(exponent, along) * kept).flatten(2).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, dim) to x * w; what stands where the mask (B, L) is False answers zero."""
        w = self.weights(x, mask)
        return (x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)) * w

    def importance(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weight of each token, mean over features, from 0 for a sample's least to 1 for its most: (B, L).

        Zeros where all weigh the same.
        """
        mean = self.weights(x, mask).mean(-1)
        if not mean.shape[1]:
            return mean
        valid = torch.ones_like(mean, dtype=torch.bool) if mask is None else mask
        low = mean.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        span = mean.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
        return ((mean - low) / span.where(span > 0, torch.ones_like(span))).masked_fill(~valid, 0)
