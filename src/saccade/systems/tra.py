"""Threshold relative attention: keys below a threshold are gone, and distances count the keys that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Stream, arg
from saccade.parts.logits import Logits
from saccade.parts.mask import Causal
from saccade.parts.tokens import On, TokenMap

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


@dataclass(frozen=True)
class RmsNorm(TokenMap):
    """Divide each query and key by its root mean square, with no learned scale (Zhang and Sennrich, 2019)."""

    eps: float = arg(1e-6, above=0.0)

    name = "rms_norm"

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)


@dataclass(frozen=True)
class ThresholdCount(Logits):
    """s_ij + n_ij log sigmoid(f_i) where s_ij is at least `threshold`, and no pair elsewhere.

    n_ij counts the keys j..i that row i keeps, so what it drops adds nothing to a distance. The stream `forget` holds
    f_i, a number a head. Keys between count by their logit alone, whatever mask they stand under. (Opper et al., TRA:
    Better Length Generalisation with Threshold Relative Attention, 2025.)
    """

    threshold: float = arg(0.0)

    name = "threshold_count"
    reach = "sweep"
    drops = True
    needs = frozenset({"key order"})

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"forget": Stream("q")}

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        kept = (s >= self.threshold) & (t.j <= t.i)
        count = kept.to(s.dtype).flip(-1).cumsum(-1).flip(-1)
        forget = logsigmoid(t.streams["forget"].to(s.dtype)).unsqueeze(-1)
        return (s + forget * count).masked_fill(~kept, -torch.inf)


@system("tra", ref="S154")
def tra(threshold: float = 0.0) -> Pairwise:
    """Causal attention of normalised queries and keys whose logits reach `threshold`; a distance counts those keys alone.

    A row that keeps no key gives zeros. (Opper et al., TRA: Better Length Generalisation with Threshold Relative
    Attention, 2025.)
    """
    return Pairwise(tokens=(RmsNorm(),), pairs=Causal(), logits=(ThresholdCount(threshold),))
