"""Maps on single tokens of q, k or v, before any pair is formed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.parts.base import Part, arg

if TYPE_CHECKING:
    from saccade.parts.pair import Context

On = Literal["q", "k", "v"]


class TokenMap(Part):
    """A map on the head vectors named in `on` that looks at one token and its position, and at `past` tokens before it."""

    kind = "tokens"
    on: ClassVar[tuple[On, ...]] = ("q", "k")

    @property
    def past(self) -> int:
        """How many tokens before its own an output depends on; a state keeps so many rows."""
        return 0

    def flops(self, head_dim: int) -> int:
        """Matrix FLOPs that a mapped head vector costs."""
        return 0

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        """x (B, heads, past + n, d), one of q, k and v, and ascending positions (B or 1, n) to (B, heads, n, d).

        The first `past` rows stand before the first position, zeros where there is no token. `c` holds the call's params,
        and its streams for these tokens.
        """
        raise NotImplementedError


class Turn(torch.autograd.Function):
    """(a cos - b sin, b cos + a sin) for the halves a, b of x, in three passes and no other buffer than the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        halves = x.unflatten(-1, (2, -1))
        out = halves * cos.unsqueeze(-2)
        out[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
        out[..., 1, :].addcmul_(halves[..., 0, :], sin)
        return out.flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Turn.apply(grads[0], cos, -sin), None, None


class Rotary(TokenMap):
    """Rotate the pairs (x_m, x_{m + d/2}) of a head vector by its position times the pair's rate."""

    needs = frozenset({"bilinear"})
    breaks = frozenset({"one query for all rows"})

    def rates(self, d: int, device: torch.device) -> Tensor:
        """Radians a token for each pair of d channels, (d / 2,) float64."""
        raise NotImplementedError

    def stretch(self) -> float:
        """What q and k are multiplied by besides."""
        return 1.0

    def angles(self, positions: Tensor, d: int) -> Tensor:
        """Radians (B or 1, 1, n, d / 2), float64, at positions (B or 1, n)."""
        return positions[:, None, :, None].double() * self.rates(d, positions.device)

    def turns(self, positions: Tensor, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles, stretched, in a dtype."""
        angle, by = self.angles(positions, d), self.stretch()
        return (by * angle.cos()).to(dtype), (by * angle.sin()).to(dtype)

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return self._turn(x, positions, 1.0, 1)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """What `map` took to x."""
        return self._turn(x, positions, self.stretch() ** -2, -1)

    def _turn(self, x: Tensor, positions: Tensor, by: float, way: int) -> Tensor:
        d = x.shape[-1]
        if d % 2:
            raise NotSupported(f"{self.name} turns pairs of channels: head_dim must be even, got {d}")
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = near_turns(self, positions, d, wide)
        cos, sin = self.turns(positions, d, wide) if kept is None else kept
        if (by, way) != (1.0, 1):
            cos, sin = by * cos, way * by * sin
        return Turn.apply(x.to(wide), cos, sin).to(x.dtype)


KEPT = 1 << 19  # cosines in a table that is kept: 16,384 positions at head_dim 64


def near_turns(part: Rotary, positions: Tensor, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The turns at consecutive positions on the CPU, cut from a table; None for others, far ones and in tracing.

    On an accelerator the first position would have to be waited for, and a tensor that outlives its stream guarded.
    """
    plain = type(positions) is Tensor and not torch.compiler.is_compiling()
    if not plain or positions.device.type != "cpu" or positions.is_floating_point() or len(positions) != 1:
        return None
    n = positions.shape[1]
    first, last = (int(positions[0, 0]), int(positions[0, -1])) if n else (0, 0)
    size = 1 << last.bit_length()
    if first < 0 or last - first + 1 != n or size * (d // 2) > KEPT:
        return None
    cos, sin = turn_table(part, size, d, dtype)
    return cos[:, :, first : last + 1], sin[:, :, first : last + 1]


@functools.lru_cache(maxsize=4)
def turn_table(part: Rotary, size: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The turns at positions 0 to size - 1 on the CPU; training may use them, even where inference made them."""
    with torch.inference_mode(False), torch.no_grad():
        return part.turns(torch.arange(size, device="cpu")[None], d, dtype)


def rope_rates(base: float, d: int, device: torch.device) -> Tensor:
    """base^(-2m/d) for m < d / 2, float64."""
    return torch.pow(base, -torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)


@dataclass(frozen=True)
class Rope(Rotary):
    """Rotate pairs (x_m, x_{m + d/2}) by position * base^(-2m/d) (Su et al., RoFormer, 2021)."""

    base: float = arg(10000.0, above=0.0)

    name = "rope"

    def rates(self, d: int, device: torch.device) -> Tensor:
        return rope_rates(self.base, d, device)


@dataclass(frozen=True)
class Unit(TokenMap):
    """Divide each head vector by its length, zeros stay zeros."""

    eps: float = arg(1e-6, above=0.0)

    name = "unit"

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1, eps=self.eps)


@dataclass(frozen=True)
class Standardize(TokenMap):
    """Centre each head vector and divide by its deviation, with no learned scale."""

    eps: float = arg(1e-5, above=0.0)

    name = "standardize"

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
