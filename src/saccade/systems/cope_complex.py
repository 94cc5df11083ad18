"""Complex queries and keys whose imaginary part brings the positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise, system
from saccade.parts.base import arg
from saccade.parts.score import Score, grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts (..., m) of head vectors (..., 2m)."""
    if x.shape[-1] % 2:
        raise NotSupported(
            f"complex_dot reads the halves of a head vector as real and imaginary parts: head_dim must be even, got {x.shape[-1]}"
        )
    real, imaginary = x.chunk(2, -1)
    return real, imaginary


@dataclass(frozen=True)
class ComplexDot(Score):
    """s = Re(sum_m q_m conj(k_m)) / sqrt(m) for the m complex numbers in a head vector: real parts, then imaginary parts.

    (Amballa, CoPE: A Lightweight Complex Positional Encoding, 2025.)
    """

    name = "complex_dot"
    factored = True
    gives = frozenset({"bilinear"})

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        real, _ = halves(c.q)
        return c.q / math.sqrt(real.shape[-1]), c.k


@dataclass(frozen=True)
class ComplexPhase(Score):
    """s = Re(z) cos(arg z) for z = sum_m q_m conj(k_m) / sqrt(m): the product, smaller the further the phases differ.

    (As described by Amballa, CoPE: A Lightweight Complex Positional Encoding, 2025.)
    """

    eps: float = arg(1e-6, above=0.0)

    name = "complex_phase"
    breaks = frozenset({"bilinear"})

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        real, imaginary = halves(c.q)
        turned = torch.cat((imaginary, -real), -1)
        return torch.cat((c.q, turned), -1) / math.sqrt(real.shape[-1]), c.k

    def tile(self, t: Tile) -> Tensor:
        k = t.k.transpose(-1, -2)
        real, imaginary = (grouped_matmul(q, k) for q in t.q.chunk(2, -1))
        return real * real / torch.sqrt(real.square() + imaginary.square() + self.eps**2)

    def pair_flops(self, head_dim: int) -> int:
        return 4 * head_dim

    def temporaries(self, head_dim: int) -> int:
        return 2


@system("cope_complex", ref="S123")
def cope_complex(phase: bool = False) -> Pairwise:
    """Softmax over the real part of complex products, with `phase` times the cosine of the phase difference.

    `sc.nn.ComplexAttention` makes such queries and keys from tokens and positions. (Amballa, CoPE: A Lightweight
    Complex Positional Encoding, 2025.)
    """
    return Pairwise(score=ComplexPhase() if phase else ComplexDot())
