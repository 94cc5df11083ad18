"""A prior over distances on the logits: ALiBi and no positions are two points of one family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.logits import Logits

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class DistancePrior(Logits):
    """s - exp(a) (|j - i - m| + eps)^b with learned shape b and scale a a head: log of a generalised Gaussian prior.

    b = 1 is ALiBi with slope exp(a), b = 0 no position; b < 0 disfavours near keys. `location` also learns where the prior
    is centred, m = exp(l) - exp(-l). (Bianchessi et al., Bayesian Attention Mechanism, 2025.)
    """

    location: bool = False
    eps: float = arg(1e-5, above=0.0)

    name = "distance_prior"
    needs = frozenset({"exp"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        own = {"prior_shape": Weight((sizes.heads,), std=0.5), "prior_scale": Weight((sizes.heads,), std=0.5)}
        return own | ({"prior_location": Weight((sizes.heads,), init="zeros")} if self.location else {})

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        shape, scale = (t.params[f"prior_{n}"].to(s.dtype)[:, None, None] for n in ("shape", "scale"))
        gap = (t.j - t.i).to(s.dtype)
        if self.location:
            gap = gap - 2 * torch.sinh(t.params["prior_location"].to(s.dtype))[:, None, None]
        return s - scale.exp() * (gap.abs() + self.eps) ** shape


@system("bam", ref="S133")
def bam(location: bool = False) -> Pairwise:
    """Softmax attention under a learned prior over distances (Bianchessi et al., Bayesian Attention Mechanism, 2025)."""
    return Pairwise(logits=(DistancePrior(location),))
