"""What the read-out of a state is divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.parts.base import Part


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
