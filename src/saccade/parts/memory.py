"""What a recurrent mechanism does with its state: forget, and divide what it reads.

Legend: b batch, g state heads, m feature size, e value size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.parts.base import Part, arg


class Decay(Part):
    """How much of the state survives a token, as a logarithm of at most 0."""

    kind = "decay"

    def log(self, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Log decay a token, (heads,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedDecay(Decay):
    """gamma_h = 1 - 2^(-first - h) (Sun et al., Retentive Network, 2023)."""

    first: float = arg(5.0, above=0.0)

    name = "fixed_decay"

    def log(self, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(
            [math.log1p(-(2.0 ** (-self.first - h))) for h in range(heads)], device=device, dtype=dtype
        )


class Ratio(Part):
    """What the read-out is divided by."""

    kind = "ratio"


def divide(x: Tensor, total: Tensor) -> Tensor:
    """x / total, and zeros where nothing was summed.

    Sums below 1e-30 (float32) divide by that instead: random features that hardly meet would overflow the gradient.
    """
    return x / total.clamp_min(torch.finfo(total.dtype).tiny ** 0.8)


def log_total(total: Tensor) -> Tensor:
    """log total, and -inf where nothing was summed."""
    empty = total == 0
    return total.masked_fill(empty, 1).log().masked_fill(empty, -torch.inf)


@dataclass(frozen=True)
class RowRatio(Ratio):
    """Divide by the row's sum of weights, so that the weights sum to one."""

    name = "ratio"
    needs = frozenset({"denominator"})
    gives = frozenset({"positive", "ratio"})


@dataclass(frozen=True)
class ChannelRatio(Ratio):
    """Divide each feature channel of the state by its own sum over keys."""

    name = "channel_ratio"
    causal = "never"
    relative = "ratio"
