"""How much of a state survives each token: one number a head, a token or a channel, always as a logarithm of at most 0.

Legend: b batch, g state heads, n tokens, m feature size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from saccade.parts.base import Part, Sizes, Stream, Weight, arg

if TYPE_CHECKING:
    from saccade.parts.pair import Context


def by_state(x: Tensor, groups: int) -> Tensor:
    """What query heads carry, (b, h or 1, n, ...), for the state heads (b, g, n, ...) that they share: the mean of a group."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[1] in (1, groups):
        return x.expand(x.shape[0], groups, *x.shape[2:])
    return x.unflatten(1, (groups, -1)).mean(2)


class Decay(Part):
    """How much of the state survives a token."""

    kind = "decay"
    moving: ClassVar[bool] = False  # whether it differs between tokens
    channels: ClassVar[bool] = False  # whether it differs between channels of the feature

    def log(self, c: Context) -> Tensor:
        """Log decay (b or 1, g, n or 1, m or 1), in float32 or wider."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedDecay(Decay):
    """gamma_h = 1 - 2^(-first - h) (Sun et al., Retentive Network, 2023)."""

    first: float = arg(5.0, above=0.0)

    name = "fixed_decay"

    def log(self, c: Context) -> Tensor:
        wide = torch.promote_types(c.k.dtype, torch.float32)
        each = [math.log1p(-(2.0 ** (-self.first - h))) for h in range(c.k.shape[1])]
        return torch.tensor(each, device=c.k.device, dtype=wide).view(1, -1, 1, 1)


@dataclass(frozen=True)
class GateDecay(Decay):
    """sigmoid(x)^(1 / temperature) of a number that each token and head brings; query heads of a group share their mean.

    (Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2024: the scalar form.)
    """

    temperature: float = arg(16.0, above=0.0)

    name = "gate_decay"
    moving = True

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"forget": Stream("k")}

    def log(self, c: Context) -> Tensor:
        return (logsigmoid(by_state(c.streams["forget"], c.k.shape[1])) / self.temperature).unsqueeze(-1)


@dataclass(frozen=True)
class ChannelDecay(Decay):
    """sigmoid(x)^(1 / temperature) for every channel of the key (Yang et al., Gated Linear Attention Transformers, 2024)."""

    temperature: float = arg(16.0, above=0.0)

    name = "channel_decay"
    moving = True
    channels = True
    needs = frozenset({"channelwise"})

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"forget": Stream("k", width=sizes.head_dim)}

    def log(self, c: Context) -> Tensor:
        return logsigmoid(by_state(c.streams["forget"], c.k.shape[1])) / self.temperature


STEP = Stream("k", start=(-6.9, -2.25))
"""The x of a step: softplus of the biases lies between 0.001 and 0.1 at first, as in Mamba-2, so that states last."""


@dataclass(frozen=True)
class StepDecay(Decay):
    """exp(-softplus(x) exp(rate_g)): a step of x along a learned rate (Dao and Gu, Transformers are SSMs: Mamba-2, 2024)."""

    name = "step_decay"
    moving = True

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"rate": Weight((sizes.kv_heads,), "zeros")}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"step": STEP}

    def log(self, c: Context) -> Tensor:
        step = softplus(by_state(c.streams["step"], c.k.shape[1]))
        return (-step * c.params["rate"].to(step.dtype).exp()[:, None]).unsqueeze(-1)
