"""A learned feature map in two parts: a matrix of each head's own, then the softmax of its channels and of their negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from saccade.parts.base import Sizes, Weight
from saccade.parts.feature import Feature
from saccade.parts.tokens import On, TokenMap

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class HeadMatrix(TokenMap):
    """W_h x for queries and keys, a matrix of each side and head, the identity at first (Zhang et al., Hedgehog, 2024)."""

    name = "head_matrix"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        d = sizes.head_dim
        return {
            "matrix_q": Weight((sizes.heads, d, d), "eye"),
            "matrix_k": Weight((sizes.kv_heads, d, d), "eye"),
        }

    def flops(self, head_dim: int) -> int:
        return 2 * head_dim**2

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return x @ c.params[f"matrix_{on}"].to(x.dtype).transpose(-1, -2)


@dataclass(frozen=True)
class SoftmaxPair(Feature):
    """phi(x) = softmax(x), then softmax(-x), over channels (Zhang et al., The Hedgehog and the Porcupine, 2024).

    Behind a learned matrix it is taught to follow a function of q.k, so rotations may stand before it.
    """

    name = "softmax_pair"
    gives = frozenset({"bilinear", "denominator", "positive"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.cat((torch.softmax(x, -1), torch.softmax(-x, -1)), -1), None

    def size(self, head_dim: int) -> int:
        return 2 * head_dim
