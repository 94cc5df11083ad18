"""What the read-out of a state is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.parts.base import Part, arg


class Ratio(Part):
    """What the read-out is divided by."""

    kind = "ratio"
    has_lse: ClassVar[bool] = False  # whether the row has a sum of weights that cannot cancel


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
    has_lse = True

    def divide(self, x: Tensor, total: Tensor) -> Tensor:
        """x over a row's sum of weights, which broadcasts."""
        return divide(x, total)


@dataclass(frozen=True)
class SignedRatio(RowRatio):
    """Divide by the row's sum of weights of either sign; one nearer to zero than `floor` counts as `floor`, its sign kept.

    So outputs stay bounded where weights cancel: there they sum to less than one in size. A key that is orthogonal to the
    query weighs 1 under `taylor(1)`.
    """

    floor: float = arg(0.01, above=0.0)

    name = "signed_ratio"
    needs = frozenset()
    gives = frozenset()
    has_lse = False

    def divide(self, x: Tensor, total: Tensor) -> Tensor:
        least = torch.where(total < 0, -self.floor, self.floor).to(total.dtype)
        return x / torch.where(total.abs() < self.floor, least, total)


@dataclass(frozen=True)
class ChannelRatio(Ratio):
    """Divide each feature channel of the state by its own sum over keys."""

    name = "channel_ratio"
    causal = "never"
    relative = "ratio"
