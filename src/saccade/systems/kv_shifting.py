"""Keys and values mixed with those of the token before."""

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
class KVShift(TokenMap):
    """a_1 k_i + a_2 k_{i-1} and b_1 v_i + b_2 v_{i-1}, four learned numbers a key-value head; zeros stand before the first.

    Each pair starts as a share and the rest of one. (Xu et al., KV Shifting Attention Enhances Language Modeling, 2024.)
    """

    name = "kv_shift"
    on = ("k", "v")

    @property
    def past(self) -> int:
        return 1

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        taps = Weight((sizes.kv_heads, 2), init="split")
        return {"shift_k": taps, "shift_v": taps}

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        own, before = c.params[f"shift_{on}"].to(x.dtype)[:, None, :, None].unbind(2)
        return own * x[:, :, 1:] + before * x[:, :, :-1]


@system("kv_shifting", ref="S151")
def kv_shifting() -> Pairwise:
    """Causal attention over keys and values that are each mixed with their predecessor, so that one layer can do induction.

    (Xu et al., KV Shifting Attention Enhances Language Modeling, 2024.)
    """
    return Pairwise(tokens=(KVShift(),), pairs=Causal())
