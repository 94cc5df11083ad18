"""Terms on logits, in listed order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.parts.base import Part, Sizes, Weight, arg

if TYPE_CHECKING:
    from saccade.parts.algebra import Pairs
    from saccade.parts.pair import Tile


@dataclass(frozen=True)
class Slots:
    """The pair (i, j) adds terms[i, at[j, 0]] + terms[i, at[j, 1]] + ... to its logit: `at` (keys, n), of `width` numbers a row."""

    at: Tensor
    width: int


class Logits(Part):
    """A map on the logits of a tile."""

    kind = "logits"
    static_bias: ClassVar[bool] = False
    drops: ClassVar[bool] = False  # True where the map answers -inf for pairs that exist by rule

    @property
    def halo(self) -> tuple[int, int, int]:
        """Rows above, keys to the left and keys to the right of a tile that a part with reach `halo` must see."""
        return 0, 0, 0

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        """Logits (b, h, Q, K) in and out; with reach `halo` s is larger by it, zero where no pair exists."""
        raise NotImplementedError

    def slots(self, pairs: Pairs) -> Slots | None:
        """Where this map adds to each logit numbers that its row holds in places that the key names; None elsewhere."""
        return None

    def terms(self, q: Tensor, params: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        """Those numbers of prepared queries (b, h, L, d), (b, h, L, width)."""
        raise NotImplementedError

    def pair_flops(self) -> int:
        """FLOPs of one pair that a counter of matrix products and convolutions sees."""
        return 0


class StaticBias(Logits):
    """A term that head and distance alone decide, so a kernel may build it once a tile shape."""

    static_bias = True

    def bias(self, i: Tensor, j: Tensor, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The term, (heads, Q, K), for query positions i (Q, 1) and key positions j (1, K)."""
        raise NotImplementedError

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        return s + self.bias(t.i, t.j, s.shape[1], s.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(-8 m / heads); for a head count that is no power of two, those of the next lower power come first."""
    whole = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (m + 1) / whole) for m in range(whole)]
    return first + [2 ** (-4 * (2 * m + 1) / whole) for m in range(heads - whole)]


@dataclass(frozen=True)
class Alibi(StaticBias):
    """s - slope |i - j| with a fixed slope a head (Press et al., Train Short, Test Long, 2022)."""

    name = "alibi"
    needs = frozenset({"exp"})
    head_bound = True

    def bias(self, i: Tensor, j: Tensor, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        slopes = torch.tensor(alibi_slopes(heads), device=i.device, dtype=dtype).view(heads, 1, 1)
        return -slopes * (i - j).abs()


@dataclass(frozen=True)
class Softcap(Logits):
    """cap tanh(s / cap): logits stay within the cap (Gemma 2: Improving Open Language Models at a Practical Size, 2024)."""

    cap: float = arg(50.0, above=0.0)

    name = "softcap"

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        return self.cap * torch.tanh(s / self.cap)


@dataclass(frozen=True)
class Temperature(Logits):
    """s / value: above 1 weights grow alike, below 1 the greatest takes over."""

    value: float = arg(1.0, above=0.0)

    name = "temperature"

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        return s / self.value


@dataclass(frozen=True)
class LengthScale(Logits):
    """s gain log(n) / log(length) with n the keys that the row may read and a learned gain a head, 1 at the start.

    A mask of single pairs does not change n, so that partial results over split keys merge. Weights of long rows do not flatten out; rows of `length` keys start as plain ones. (Nakanishi, Scalable-Softmax Is
    Superior for Attention, 2025; Chiang and Cholak, Overcoming a Theoretical Limitation of Self-Attention, 2022.)
    """

    length: int = arg(512, at_least=2)

    name = "length_scale"
    reach = "count"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"length_scale": Weight((sizes.heads,), init="ones")}

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        assert t.count is not None
        gain = t.params["length_scale"].to(s.dtype)[:, None, None]
        return s * gain * (t.count.clamp_min(1).to(s.dtype).log() / math.log(self.length))


@dataclass(frozen=True)
class PerKey(Logits):
    """s / n with n the keys that the row may read, whatever a mask of single pairs leaves (Ma et al., Mega, 2023)."""

    name = "per_key"
    reach = "count"

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        assert t.count is not None
        return s / t.count.clamp_min(1).to(s.dtype)
