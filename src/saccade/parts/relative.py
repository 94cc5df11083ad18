"""Learned terms that depend on how far a key stands from its query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.base import Part, Sizes, Weight, arg
from saccade.parts.logits import Logits
from saccade.parts.value import Value

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class T5Bias(Logits):
    """s + b[bucket(i - j)], one learned number a head and bucket (Raffel et al., Exploring the Limits of Transfer, 2020).

    Half of the buckets of a side are single distances, the other half grow by a constant ratio up to `distance`, and the
    last holds all beyond. `two_sided` gives later keys half of the buckets; otherwise they share that of distance 0.
    """

    buckets: int = arg(32, at_least=2)
    distance: int = arg(128, at_least=1)
    two_sided: bool = False

    name = "t5_bias"
    needs = frozenset({"exp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_sided and self.buckets % 2:
            raise MechanismError(
                f"t5_bias: both sides share the buckets, give an even number, got {self.buckets}"
            )
        if self.distance <= self._single:
            raise MechanismError(
                f"t5_bias: distance must be above the {self._single} single distances, got {self.distance}"
            )

    @property
    def _side(self) -> int:
        return self.buckets // 2 if self.two_sided else self.buckets

    @property
    def _single(self) -> int:
        return max(1, self._side // 2)

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"t5_bias": Weight((sizes.heads, self.buckets), init="zeros")}

    def bucket(self, back: Tensor) -> Tensor:
        """The bucket of a key that stands `back` = i - j before its query."""
        far = back.abs() if self.two_sided else back.clamp_min(0)
        exact, last = self._single, self._side - 1
        ratio = torch.log(far.double().clamp_min(exact) / exact) / math.log(self.distance / exact)
        coarse = (exact + (ratio * (self._side - exact) + 1e-9).long()).clamp_max(last)
        found = torch.where(far < exact, far, coarse)
        return found + self._side * (back < 0) if self.two_sided else found

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        bias = t.params["t5_bias"].to(s.dtype)[:, self.bucket(t.i - t.j)[:, 0]]
        return s + bias.transpose(0, 1)


class Relative(Part):
    """A table with a learned row for each distance j - i clipped to -clip..clip."""

    clip: int

    def index(self, t: Tile) -> Tensor:
        """Which row of the table each pair of a tile takes, (b or 1, 1, Q, K)."""
        return (t.j - t.i).clamp(-self.clip, self.clip) + self.clip


@dataclass(frozen=True)
class RelBias(Relative, Logits):
    """s + b[clip(j - i)], one learned number a head and distance (Ma et al., Mega, 2023: the simple bias)."""

    clip: int = arg(16, at_least=1)

    name = "rel_bias"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"rel_bias": Weight((sizes.heads, 2 * self.clip + 1), init="zeros")}

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        bias = t.params["rel_bias"].to(s.dtype)[:, self.index(t)[:, 0]]
        return s + bias.transpose(0, 1)


@dataclass(frozen=True)
class RelTable(Relative, Logits):
    """s + q.a[clip(j - i)], a shared by all heads, q scaled as the score does.

    (Shaw et al., Self-Attention with Relative Position Representations, 2018.)
    """

    clip: int = arg(16, at_least=1)

    name = "rel_table"
    needs = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"rel_table": Weight((2 * self.clip + 1, sizes.head_dim), std=sizes.head_dim**-0.5)}

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 2 * (2 * self.clip + 1) * sizes.head_dim

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        terms = t.q.to(s.dtype) @ t.params["rel_table"].to(s.dtype).T
        return s + terms.gather(-1, self.index(t).expand(s.shape))


@dataclass(frozen=True)
class RelValue(Relative, Value):
    """sum_j w_ij a[clip(j - i)], a shared by all heads: weights are added up by distance first (Shaw et al., 2018)."""

    clip: int = arg(16, at_least=1)

    name = "rel_value"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"rel_value": Weight((2 * self.clip + 1, sizes.value_dim), std=sizes.value_dim**-0.5)}

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 2 * (2 * self.clip + 1) * sizes.value_dim

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        return self.by_distance(w, t) @ t.params["rel_value"].to(w.dtype)

    def by_distance(self, w: Tensor, t: Tile) -> Tensor:
        """Weights (b, h, Q, K) of a tile summed for each row of the table, (b, h, Q, 2 clip + 1)."""
        near = t.i + torch.arange(1 - self.clip, self.clip, device=w.device)
        keys = t.j.flatten()
        at = torch.searchsorted(keys, near).clamp_max(len(keys) - 1)
        single = w.gather(-1, at.expand(*w.shape[:3], -1)) * (keys[at] == near)
        ends = [(w * far).sum(-1, keepdim=True) for far in (t.j - t.i <= -self.clip, t.j - t.i >= self.clip)]
        return torch.cat((ends[0], single, ends[1]), -1)
