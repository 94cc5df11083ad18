"""Attention that may look away: a sentinel vector of the decoder competes with the regions of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Stream, Weight, arg
from saccade.parts.score import Additive
from saccade.parts.slots import Slots

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class Sentinel(Slots):
    """A slot whose key and value are a stream: z = v.tanh(Wq q + Ws sentinel), Wq and v those of the additive score.

    The stream `sentinel` (B, H, L, E) holds a vector for each query; `hidden` is that of the score. (Lu et al., Knowing
    When to Look, 2017.)
    """

    hidden: int = arg(32, at_least=1)

    name = "sentinel"
    needs = frozenset({"exp", "additive"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        std = 1 / math.sqrt(sizes.value_dim)
        return {"sentinel_k": Weight((sizes.heads, sizes.value_dim, self.hidden), std=std)}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"sentinel": Stream("q", width=sizes.value_dim)}

    def rows(self, c: Context) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(c.q.dtype, torch.float32)
        wq, v, ws = (c.params[n].to(wide) for n in ("additive_q", "additive_v", "sentinel_k"))
        if wq.shape[-1] != self.hidden:
            raise ValueError(
                f"sentinel({self.hidden}) shares the hidden layer of additive({wq.shape[-1]}); give both the same width"
            )
        sentinel = c.streams["sentinel"].to(wide)
        hidden = torch.tanh(c.q.to(wide) @ wq + sentinel @ ws)
        return (hidden * v[:, None]).sum(-1, keepdim=True), sentinel.unsqueeze(-2)


@system("adaptive_attention", ref="S020")
def adaptive_attention(hidden: int = 32) -> Pairwise:
    """Additive attention over regions and a sentinel of the decoder, in one softmax (Lu et al., Knowing When to Look, 2017)."""
    return Pairwise(slots=Sentinel(hidden), score=Additive(hidden))
