"""Positions that count what the query cares for, instead of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.logits import Logits

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class ContextCount(Logits):
    """s + q.e[p] at the contextual position p_ij = sum of the gates g_ij..g_ii, at most `most`.

    g = sigmoid(s sqrt(d)), which is sigmoid(q.k) under `dot`; between two integers e is interpolated. q is scaled as the
    score does. All keys from j to i count, whatever mask they stand under. (Golovneva et al., Contextual Position Encoding, 2024.)
    """

    most: int = arg(16, at_least=1)

    name = "context_count"
    reach = "sweep"
    needs = frozenset({"bilinear", "key order"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"context_count": Weight((self.most + 1, sizes.head_dim), std=sizes.head_dim**-0.5)}

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 2 * (self.most + 1) * sizes.head_dim

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        gates = (s * math.sqrt(t.q.shape[-1])).sigmoid().masked_fill(t.j > t.i, 0.0)
        count = gates.flip(-1).cumsum(-1).flip(-1).clamp_max(self.most)
        terms = t.q.to(s.dtype) @ t.params["context_count"].to(s.dtype).T
        at = count.detach().long().clamp(0, self.most - 1)
        return s + terms.gather(-1, at) + (count - at) * terms.diff(dim=-1).gather(-1, at)
