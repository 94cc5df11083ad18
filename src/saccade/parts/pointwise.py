"""Weights without a sum over the row to one: each pair for itself, or a row brought to a mean and a deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.normalizer import Normalizer

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class Relu(Normalizer):
    """w = max(0, s): a row may weigh nothing at all (Zhang, Titov and Sennrich, Sparse Attention with Linear Units, 2021)."""

    name = "relu"
    held = (2, 4)
    gives = frozenset({"positive"})

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        return torch.relu(s), None


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """w = sigmoid(s - log n), n the keys that the row may read, or sigmoid(s) when not `counted`.

    (Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, 2024.)
    """

    counted: bool = arg(True)

    name = "sigmoid"
    held = (3, 4)
    gives = frozenset({"positive"})

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        if self.counted:
            s = s - row_count(s).clamp_min(1).to(s.dtype).log()
        return torch.sigmoid(s), None


@dataclass(frozen=True)
class Laplace(Normalizer):
    """w = (1 + erf((s - mean) / (deviation sqrt 2))) / 2, mean sqrt(1/2), deviation sqrt(1/(4 pi)): near relu(s)^2 at s = mean.

    (Ma et al., Mega: Moving Average Equipped Gated Attention, 2023.)
    """

    name = "laplace"
    held = (3, 4)
    gives = frozenset({"positive"})

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        return torch.erfc((math.sqrt(0.5) - s) * math.sqrt(2 * math.pi)) / 2, None


@dataclass(frozen=True)
class Unnormalized(Normalizer):
    """w = s: the score is the weight, of any sign."""

    name = "unnormalized"
    held = (2, 3)

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        return s.masked_fill(torch.isneginf(s.detach()), 0.0), None


@dataclass(frozen=True)
class RowStandard(Normalizer):
    """w = gain (s - mean) / (deviation + eps) + bias over the keys of a row, gain and bias learned a head.

    Where all logits of a row are equal, as in a row of one key, every weight is the bias. (Richter and Wattenhofer,
    Normalized Attention Without Probability Cage, 2020.)
    """

    eps: float = arg(1e-5, above=0.0)

    name = "row_standard"
    held = (4, 8)

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {
            "row_gain": Weight((sizes.heads,), init="ones"),
            "row_bias": Weight((sizes.heads,), init="zeros"),
        }

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        assert t is not None
        gain, bias = (t.params[n].to(s.dtype)[:, None, None] for n in ("row_gain", "row_bias"))
        gone = torch.isneginf(s.detach())
        count = row_count(s).clamp_min(1).to(s.dtype)
        mean = s.masked_fill(gone, 0.0).sum(-1, keepdim=True) / count
        centred = (s - mean).masked_fill(gone, 0.0)
        variance = centred.square().sum(-1, keepdim=True) / count
        deviation = variance.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
        return (gain * centred / (deviation + self.eps) + bias).masked_fill(gone, 0.0), None


def row_count(s: Tensor) -> Tensor:
    """How many pairs of each row exist, (..., 1), for logits that are -inf where none does."""
    return (s.detach() > -torch.inf).sum(-1, keepdim=True)
