"""A first layer whose positions stand in the imaginary part of its tokens; all later layers need none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.nn.positions import sinusoids
from saccade.plan import attend


class ComplexAttention(nn.Module):
    """Attention over z_t = x_t + i gamma p_t with complex maps to q and k, and a real value map of x.

    `positions` p are sinusoids, or with `max_length` a learned table. x is (B, n, dim), the answer (B, n, dim); `complex_weights`
    gives the maps of q and k imaginary parts. (Amballa, CoPE: A Lightweight Complex Positional Encoding, 2025.)

    >>> ComplexAttention(32, heads=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "cope_complex",
        *,
        gamma: float = 1.0,
        max_length: int | None = None,
        complex_weights: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 2 or dim % 2 or dim % heads:
            raise ValueError(f"dim must be even and a multiple of heads, got dim={dim} and heads={heads}")
        self.mechanism = parse(mechanism)
        if not isinstance(self.mechanism, Pairwise) or not self.mechanism.score.name.startswith("complex"):
            raise ValueError(
                f"complex_attention needs a complex score, as in cope_complex, got {self.mechanism}"
            )
        self.heads, self.gamma = heads, gamma
        self.table = None if max_length is None else nn.Parameter(torch.randn(max_length, dim))
        self.real, self.value_proj = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.imaginary = nn.Linear(dim, 2 * dim, bias=False) if complex_weights else None
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def positions(self, x: Tensor) -> Tensor:
        """The imaginary parts (n, dim) of tokens x (B, n, dim)."""
        n, dim = x.shape[1:]
        if self.table is None:
            return self.gamma * sinusoids(torch.arange(n, device=x.device), dim).to(x.dtype)
        if n > len(self.table):
            raise ValueError(
                f"{n} tokens are more than max_length={len(self.table)}; give a larger one, or none for sinusoids"
            )
        return self.gamma * self.table[:n]

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features (B, n, dim); later positions than `key_lengths` (B,) are padding."""
        p = self.positions(x).expand_as(x)
        real, imaginary = self.real(x), self.real(p)
        if self.imaginary is not None:
            real, imaginary = real - self.imaginary(p), imaginary + self.imaginary(x)
        parts = (y.unflatten(-1, (2, self.heads, -1)) for y in (real, imaginary))
        q, k = torch.cat(tuple(parts), -1).permute(2, 0, 3, 1, 4)
        v = self.value_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attend(q, k, v, self.mechanism, key_lengths=key_lengths)
        return self.out_proj(out.transpose(1, 2).flatten(2))
