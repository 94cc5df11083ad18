"""Terms on logits, in listed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.parts.base import Part

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


class Logits(Part):
    """A map on the logits of a tile."""

    kind = "logits"
    static_bias: ClassVar[bool] = False

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        """Logits (b, h, Q, K) in and out."""
        raise NotImplementedError


class StaticBias(Logits):
    """A term that head and distance alone decide, so a kernel may build it once a tile shape."""

    static_bias = True

    def bias(self, i: Tensor, j: Tensor, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The term, (heads, Q, K), for query positions i (Q, 1) and key positions j (1, K)."""
        raise NotImplementedError

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        return s + self.bias(t.i, t.j, s.shape[1], s.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(-8 m / heads); for a head count that is no power of two, those of the next lower power come first."""
    whole = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (m + 1) / whole) for m in range(whole)]
    return first + [2 ** (-4 * (2 * m + 1) / whole) for m in range(heads - whole)]


@dataclass(frozen=True)
class Alibi(StaticBias):
    """s - slope |i - j| with a fixed slope a head (Press et al., Train Short, Test Long, 2022)."""

    name = "alibi"
    needs = frozenset({"exp"})

    def bias(self, i: Tensor, j: Tensor, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        slopes = torch.tensor(alibi_slopes(heads), device=i.device, dtype=dtype).view(heads, 1, 1)
        return -slopes * (i - j).abs()
