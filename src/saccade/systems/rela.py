"""Rectified linear attention: weights that are zero or grow with the score, and a gated norm after the mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.output import Output
from saccade.parts.pointwise import Relu

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class GatedNorm(Output):
    """z / rms(z) times a gain times sigmoid(w z), gain and w a channel and head (Zhang et al., Sparse Attention, 2021: ReLA-g)."""

    eps: float = arg(1e-6, above=0.0)

    name = "gated_norm"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        shape = (sizes.heads, sizes.value_dim)
        return {"gated_norm": Weight(shape, init="ones"), "gated_norm_gate": Weight(shape, init="zeros")}

    def map(self, out: Tensor, c: Context) -> Tensor:
        z = out.to(torch.promote_types(out.dtype, torch.float32))
        gain, gate = (c.params[n][:, None].to(z.dtype) for n in ("gated_norm", "gated_norm_gate"))
        scale = torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        return (z * scale * gain * torch.sigmoid(gate * z)).to(out.dtype)


@system("rela", ref="S186")
def rela() -> Pairwise:
    """max(0, q.k / sqrt(d)) v, then a gated root mean square norm (Zhang, Titov and Sennrich, Sparse Attention with Linear Units, 2021)."""
    return Pairwise(normalizer=Relu(), output=(GatedNorm(),))
