"""No positions, and a temperature a head that is tuned alone for longer texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight
from saccade.parts.mask import Causal
from saccade.parts.tokens import On, TokenMap

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class HeadScale(TokenMap):
    """q times exp(a), one learned a a head: 1 at first (Wang et al., Length Generalization without Position Encoding, 2024)."""

    name = "head_scale"
    on = ("q",)

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"head_scale": Weight((sizes.heads,), init="zeros")}

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return x * c.params["head_scale"].exp()[:, None, None].to(x.dtype)


@system("nope_head_scale", ref="S125")
def nope_head_scale() -> Pairwise:
    """Causal attention without positions, its logits times a learned temperature a head; `sc.nn.HeadScales` tunes them alone.

    (Wang et al., Length Generalization of Causal Transformers without Position Encoding, 2024.)
    """
    return Pairwise(tokens=(HeadScale(),), pairs=Causal())
