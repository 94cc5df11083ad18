"""Signed weights from a similarity and a distance: values are added, subtracted or left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.pointwise import Unnormalized
from saccade.parts.score import Score, grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class DotL1(Score):
    """s = tanh(q.k / sqrt(d)) sigmoid(-|q - k|_1 / sqrt(d)), of either sign and below 1 in size.

    (Tay et al., Compositional De-Attention Networks, 2019; Comateformer: Combined Attention Transformer for Semantic
    Sentence Matching, 2024.)
    """

    name = "dot_l1"
    breaks = frozenset({"bilinear"})

    def tile(self, t: Tile) -> Tensor:
        wide = torch.promote_types(t.q.dtype, torch.float32)
        q, k = t.q.to(wide), t.k.to(wide)
        b, h, rows, d = q.shape
        g, keys = k.shape[1], k.shape[2]
        product = grouped_matmul(q, k.transpose(-1, -2))
        distance = torch.cdist(q.reshape(b, g, h // g * rows, d), k, p=1.0).view(b, h, rows, keys)
        return torch.tanh(product / math.sqrt(d)) * torch.sigmoid(-distance / math.sqrt(d))

    def temporaries(self, head_dim: int) -> int:
        return 4


@system("comateformer", ref="S199")
def comateformer() -> Pairwise:
    """tanh of a product times sigmoid of a negative L1 distance, no softmax (Comateformer: Combined Attention Transformer, 2024)."""
    return Pairwise(score=DotL1(), normalizer=Unnormalized())
