"""What the queries of a layer are like before positions turn them: their mean and covariance, as they come.

Legend: b batch, h query heads, L queries, d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: channels m and m + half, of the first 2 half channels, turn by `frequencies`[m] a position.

    (Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.)
    """

    frequencies: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """The turns of positions (L,), complex (L, half)."""
        angle = positions[:, None].double() * self.frequencies.double()
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def ahead(self, start: int, count: int) -> Tensor:
        """The mean of the turns of positions start to start + count - 1, complex (half,)."""
        return self.at(torch.arange(start, start + count, device=self.frequencies.device)).mean(0)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x (..., d) with its pairs of channels turned by complex factors (..., half); the other channels stay."""
    half = turn.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    c, s = turn.real.to(x.dtype), turn.imag.to(x.dtype)
    return torch.cat((a * c - b * s, a * s + b * c, x[..., 2 * half :]), -1)


class Moments:
    """Count (b,), mean (b, h, d) and covariance (b, h, d, d) of all queries after the first `skip` of each sample."""

    def __init__(self, skip: int = 0, rotation: Rotation | None = None) -> None:
        self.skip, self.rotation = skip, rotation
        self.seen: Tensor | None = None  # (b,) tokens, those that were skipped included
        self.count = self.mean = self.scatter = torch.zeros(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = [] if self.seen is None else [self.seen, self.count, self.mean, self.scatter]
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def covariance(self) -> Tensor:
        """(b, h, d, d)."""
        return self.scatter / self.count.clamp_min(1)[:, None, None, None]

    def add(self, q: Tensor, start: int, there: Tensor | None = None) -> None:
        """Count in the queries (b, h, L, d) of the tokens from `start` on; `there` (b, L) is False where one is padding."""
        b, h, length, d = q.shape
        q = q.float()
        if self.rotation is not None:
            places = torch.arange(start, start + length, device=q.device)
            q = turned(q, self.rotation.at(places).conj())
        if self.seen is None:
            self.seen = torch.zeros(b, dtype=torch.long, device=q.device)
            self.count = q.new_zeros(b)
            self.mean, self.scatter = q.new_zeros(b, h, d), q.new_zeros(b, h, d, d)
        if there is None:
            there = torch.ones(b, length, dtype=torch.bool, device=q.device)
        order = self.seen[:, None] + there.cumsum(1)
        counted = there & (order > self.skip)
        self.seen = order[:, -1]
        new = counted.sum(1).float()
        total = (self.count + new).clamp_min(1)
        q = q.masked_fill(~counted[:, None, :, None], 0)
        mean = q.sum(2) / new.clamp_min(1)[:, None, None]
        apart = (q - mean.unsqueeze(2)).masked_fill(~counted[:, None, :, None], 0)
        shift = mean - self.mean
        between = (self.count * new / total)[:, None, None, None]
        self.scatter = (
            self.scatter
            + apart.transpose(-1, -2) @ apart
            + between * shift.unsqueeze(-1) * shift.unsqueeze(-2)
        )
        self.mean = self.mean + shift * (new / total)[:, None, None]
        self.count = self.count + new

    def select(self, samples: Sequence[int]) -> None:
        """Keep these samples of the batch, in this order."""
        if self.seen is None:
            return
        index = torch.tensor(list(samples), device=self.seen.device)
        self.seen, self.count = self.seen[index], self.count[index]
        self.mean, self.scatter = self.mean[index], self.scatter[index]
