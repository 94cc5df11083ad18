"""Forecasts of many channels at once: a token a channel and time, attention over both axes."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.mechanism import Mechanism
from saccade.nn.attention import Attention
from saccade.nn.transformer import FeedForward


class MVPFormer(nn.Module):
    """Segments (B, times, channels, width) to the next segment of every channel, in the same shape.

    Any number of channels and times; no output reads a later time. (Carzaniga et al., A Foundation Model with
    Multi-Variate Parallel Attention, 2025.)

    >>> import torch
    >>> MVPFormer(4, dim=16, depth=1, heads=2)(torch.zeros(2, 6, 3, 4)).shape
    torch.Size([2, 6, 3, 4])
    """

    def __init__(
        self,
        width: int,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        mechanism: str | Mechanism = "gqa(2) + mvpa",
    ) -> None:
        super().__init__()
        self.width, self.encoder = width, nn.Linear(width, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.attention = nn.ModuleList(Attention(dim, heads, mechanism) for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim) for _ in range(depth))
        self.decoder = nn.Linear(dim, width)

    def forward(self, segments: Tensor) -> Tensor:
        """What each segment is followed by, segments (B, times, channels, width)."""
        if segments.dim() != 4 or segments.shape[-1] != self.width:
            raise ValueError(
                f"segments must be (batch, times, channels, {self.width}), got {tuple(segments.shape)}"
            )
        grid = segments.shape[1:3]
        x = self.encoder(segments).flatten(1, 2)
        for n, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            x = x + attention(self.norms[2 * n](x), grid=tuple(grid))
            x = x + feed_forward(self.norms[2 * n + 1](x))
        return self.decoder(self.norms[-1](x)).unflatten(1, grid)
