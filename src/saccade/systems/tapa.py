"""A score whose sign and size turn with a phase that query and key agree on and that distance winds up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.base import arg
from saccade.parts.score import Score, grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


@dataclass(frozen=True)
class PhaseDot(Score):
    """s = a cos(2 pi |i - j|^alpha p): a and p are scaled dot products of the first `share` of the channels and of the rest.

    As described: the formula comes from a summary of the paper. (Positional Encoding via Token-Aware Phase Attention, 2025.)
    """

    share: float = arg(0.5, above=0.0)
    alpha: float = arg(0.5, above=0.0)

    name = "phase_dot"
    breaks = frozenset({"bilinear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share >= 1:
            raise MechanismError(f"phase_dot: share must be a number below 1, got {self.share}")

    def split(self, head_dim: int) -> int:
        """Channels of the amplitude; at least one is left on either side."""
        if head_dim < 2:
            raise ValueError(
                f"phase_dot splits the channels of a head, which has {head_dim}; give it at least 2"
            )
        return min(head_dim - 1, max(1, round(self.share * head_dim)))

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        at = self.split(c.q.shape[-1])
        amplitude, phase = c.q[..., :at], c.q[..., at:]
        return torch.cat((amplitude / math.sqrt(at), phase / math.sqrt(phase.shape[-1])), -1), c.k

    def tile(self, t: Tile) -> Tensor:
        wide = torch.promote_types(t.q.dtype, torch.float32)
        q, k, at = t.q.to(wide), t.k.to(wide), self.split(t.q.shape[-1])
        amplitude = grouped_matmul(q[..., :at], k[..., :at].transpose(-1, -2))
        phase = grouped_matmul(q[..., at:], k[..., at:].transpose(-1, -2))
        turns = (t.i - t.j).abs().to(wide).pow(self.alpha)
        return amplitude * torch.cos(2 * math.pi * turns * phase)

    def temporaries(self, head_dim: int) -> int:
        return 4


@system("tapa", ref="S216")
def tapa(share: float = 0.5, alpha: float = 0.5) -> Pairwise:
    """Softmax over amplitudes times cosines of token-aware phases (Positional Encoding via Token-Aware Phase Attention, 2025)."""
    return Pairwise(score=PhaseDot(share, alpha))
