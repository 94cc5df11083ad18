"""Changes to weights after the normaliser, not renormalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.parts.base import Part, Sizes, Stream, arg

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


class Reweight(Part):
    """A map on the weights of a tile, linear in them."""

    kind = "reweight"

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        """Weights (b, h, Q, K) in and out."""
        raise NotImplementedError

    def pair_flops(self) -> int:
        """FLOPs of one pair that a counter of matrix products sees."""
        return 0


@dataclass(frozen=True)
class GaussGate(Reweight):
    """w exp(-(j - centre)^2 / (2 (half/2)^2)), not renormalised (Luong et al., 2015: `local-p`).

    The stream `centre` (B, H, L) holds a key position for each query.
    """

    half: int = arg(8, at_least=1)

    name = "gauss_gate"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"centre": Stream("q", hidden=sizes.head_dim, positions=True)}

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        gap = t.j - t.streams["centre"].unsqueeze(-1)
        return w * torch.exp(-gap.square() / (2 * (self.half / 2) ** 2)).to(w.dtype)
