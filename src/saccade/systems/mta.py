"""Weights that depend on the logits of neighbouring queries and keys, and of neighbouring heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.logits import Logits
from saccade.parts.output import OutNorm
from saccade.parts.reweight import Reweight

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class PairConv(Logits):
    """s_ij plus a convolution of the logits of the last `queries` rows and of `keys` keys around j, its taps learned a head.

    Tap (a, b) weighs row i - a and key j + b - (keys - 1) / 2. Logits of pairs that do not exist count as 0, which keeps
    it causal; so do rows before the first query of a call. (Golovneva et al., Multi-Token Attention, 2025: the kernel
    there is the taps plus the identity, from which it starts.)
    """

    queries: int = arg(6, at_least=1)
    keys: int = arg(11, at_least=1)

    name = "pair_conv"
    reach = "halo"

    @property
    def halo(self) -> tuple[int, int, int]:
        return self.queries - 1, (self.keys - 1) // 2, self.keys // 2

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"pair_conv": Weight((sizes.heads, self.queries, self.keys), init="zeros")}

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        above, left, right = self.halo
        taps = t.params["pair_conv"].to(s.dtype).flip(1)
        own = s[:, :, above:, left : s.shape[-1] - right]
        return own + torch.nn.functional.conv2d(s, taps[:, None], groups=s.shape[1])

    def pair_flops(self) -> int:
        return 2 * self.queries * self.keys


@dataclass(frozen=True)
class HeadMix(Reweight):
    """Each weight becomes a learned mix of those of the `group` heads it belongs with (Golovneva et al., 2025)."""

    group: int = arg(2, at_least=1)

    name = "head_mix"
    reach = "head"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        if sizes.heads % self.group:
            raise ValueError(
                f"head_mix({self.group}) needs a multiple of {self.group} heads, got {sizes.heads}"
            )
        return {"head_mix": Weight((sizes.heads // self.group, self.group, self.group), init="eye")}

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        mix = t.params["head_mix"].to(w.dtype)
        return torch.einsum("nxy,bnyqk->bnxqk", mix, w.unflatten(1, (-1, self.group))).flatten(1, 2)

    def pair_flops(self) -> int:
        return 2 * self.group


@system("mta", ref="S173")
def mta(queries: int = 6, keys: int = 11, heads: int = 2) -> Pairwise:
    """Logits convolved over queries and keys, weights mixed over `heads` heads, outputs normed (Golovneva et al., Multi-Token Attention, 2025).

    The norm is the root mean square of each head; the paper's scale by depth is the start of its learned gain.
    """
    return Pairwise(logits=(PairConv(queries, keys),), reweight=(HeadMix(heads),), output=(OutNorm(),))
