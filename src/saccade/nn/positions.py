"""Absolute positions as vectors that are added to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.parts.tokens import rope_rates


class LearnedPositions(nn.Embedding):
    """A learned vector for each position below max_length (Gehring et al., Convolutional Sequence to Sequence, 2017)."""

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__(max_length, dim)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Tokens x (B, n, dim) at positions start, start + 1, ... with their vectors added."""
        end = start + x.shape[1]
        if end > self.num_embeddings:
            raise ValueError(
                f"{end} tokens are more than max_length={self.num_embeddings}; build the model with a larger one"
            )
        return x + self.weight[start:end].to(x.dtype)


class SinusoidalPositions(nn.Module):
    """`scale` times sin and cos of position * base^(-2m/dim), taking turns (Vaswani et al., Attention Is All You Need, 2017).

    The scale is learned from its starting value with `learned_scale`.
    """

    def __init__(
        self, dim: int, base: float = 10000.0, scale: float = 1.0, learned_scale: bool = False
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"sinusoidal positions are pairs of channels: dim must be even, got {dim}")
        if base <= 0:
            raise ValueError(f"base must be above 0, got {base}")
        self.dim, self.base = dim, base
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learned_scale)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Tokens x (B, n, dim) at positions start, start + 1, ... with their vectors added."""
        at = torch.arange(start, start + x.shape[1], device=x.device)
        return x + (self.scale * sinusoids(at, self.dim, self.base)).to(x.dtype)


def sinusoids(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """sin and cos of positions (...) times base^(-2m/dim), taking turns: (..., dim), float64."""
    angle = positions.double().unsqueeze(-1) * rope_rates(base, dim, positions.device)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def position_vectors(kind: str, dim: int, max_length: int) -> nn.Module | None:
    """What a model adds to its tokens: `learned`, `sinusoidal` (as small as its tokens at first), None for `none`."""
    if kind == "learned":
        return LearnedPositions(max_length, dim)
    if kind == "sinusoidal":
        return SinusoidalPositions(dim, scale=0.02 * 2**0.5, learned_scale=True)
    if kind == "none":
        return None
    raise ValueError(f"positions must be learned, sinusoidal or none, got {kind!r}")
