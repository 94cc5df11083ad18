"""Linear attention with one fixed decay a head and no denominator: norm and gate come after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Recurrent, system
from saccade.parts.base import Sizes, Stream, arg
from saccade.parts.decay import Decay
from saccade.parts.logits import alibi_slopes
from saccade.parts.mask import Causal
from saccade.parts.output import Output

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class SlopeDecay(Decay):
    """exp(-share 2^(-8 h / H)) for head h of 1..H; the share falls from layer to layer, and a share of 0 forgets nothing.

    The slopes are those of the authors' code. (Qin et al., TransNormerLLM: A Faster and Better Large Language Model with
    Improved TransNormer, 2023.)
    """

    share: float = arg(1.0, at_least=0.0)

    name = "slope_decay"

    def log(self, c: Context) -> Tensor:
        wide = torch.promote_types(c.k.dtype, torch.float32)
        each = [-self.share * x for x in alibi_slopes(c.k.shape[1])]
        return torch.tensor(each, device=c.k.device, dtype=wide).view(1, -1, 1, 1)


@dataclass(frozen=True)
class SimpleNorm(Output):
    """out over the root mean square of all heads and channels of a token, no learned gain (Qin et al., TransNormerLLM, 2023)."""

    eps: float = arg(1e-6, above=0.0)

    name = "simple_norm"

    def map(self, out: Tensor, c: Context) -> Tensor:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean((1, 3), keepdim=True) + self.eps)).to(out.dtype)


@dataclass(frozen=True)
class ChannelGate(Output):
    """out times sigmoid of a stream, one number a channel of each head and token (Qin et al., TransNormerLLM, 2023)."""

    name = "channel_gate"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"channel_gate": Stream("q", width=sizes.value_dim)}

    def map(self, out: Tensor, c: Context) -> Tensor:
        return out * torch.sigmoid(c.streams["channel_gate"]).to(out.dtype)


@system("lightning_attention_tnl", ref="S210")
def lightning_attention_tnl(share: float = 1.0) -> Recurrent:
    """q k^T decayed by a slope a head, normalised over the whole token and gated; `layers` gives the share of each layer.

    (Qin et al., Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, 2024.)
    """
    return Recurrent(pairs=Causal(), decay=SlopeDecay(share), output=(SimpleNorm(), ChannelGate()))


def layers(depth: int) -> tuple[str, ...]:
    """The texts of `depth` layers for `nn.Transformer(mechanism=layers(depth))`: later ones forget less, the last nothing."""
    if depth < 1:
        raise MechanismError(f"lightning layers: depth must be at least 1, got {depth}")
    shares = (1 - n / max(1, depth - 1) for n in range(depth))
    return tuple(f"lightning_attention_tnl({share:.6g})" for share in shares)
