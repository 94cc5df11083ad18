"""Based: a Taylor state that remembers everything roughly, windows that see nearby exactly, short convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Recurrent, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.feature import Taylor
from saccade.parts.mask import Causal
from saccade.parts.memory import RowRatio
from saccade.parts.tokens import On, TokenMap

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class ValueConv(TokenMap):
    """sum_t taps_t * v_{i-t} over `width` tokens, one kernel a channel of each key-value head; zeros stand before the first.

    (Arora et al., Simple linear attention language models balance the recall-throughput tradeoff, 2024.)
    """

    width: int = arg(3, at_least=1)

    name = "value_conv"
    on = ("v",)

    @property
    def past(self) -> int:
        return self.width - 1

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"value_conv": Weight((sizes.kv_heads, self.width, sizes.value_dim), std=self.width**-0.5)}

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        taps, rows = c.params["value_conv"].to(x.dtype), x.shape[2] - self.past
        out = x[:, :, self.past :] * taps[:, :1]
        for back in range(1, self.width):
            first = self.past - back
            out = torch.addcmul(out, x[:, :, first : first + rows], taps[:, back : back + 1])
        return out


@system("based", ref="S197")
def based() -> Recurrent:
    """Linear attention by the second-order Taylor series of softmax, meant for heads of about 16 channels in q and k.

    `layers` mixes it with exact windows and short convolutions. (Arora et al., Simple linear attention language models
    balance the recall-throughput tradeoff, 2024.)
    """
    return Recurrent(pairs=Causal(), feature=Taylor(), ratio=RowRatio())


def layers(window: int = 64, width: int = 3) -> tuple[str, ...]:
    """Five layers to be repeated by `nn.Transformer(mechanism=layers(), head_dim=16)`: three convolutions, a state, a window.

    The short gated convolution is a window of the token alone over convolved values, times a gate a head.
    """
    conv = f"uniform + window(1) + value_conv({width}) + out_gate"
    return conv, "based", f"window({window})", conv, conv
