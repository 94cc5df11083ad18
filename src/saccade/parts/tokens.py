"""Maps on single tokens of q, k or v, before any pair is formed."""

from __future__ import annotations

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
    """A map on the head vectors named in `on` that looks at one token and its position."""

    kind = "tokens"
    on: ClassVar[tuple[On, ...]] = ("q", "k")

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        """x (B, heads, n, d), one of q, k and v, and positions (B or 1, n) to (B, heads, n, d).

        `c` holds the call's params, and its streams for these tokens.
        """
        raise NotImplementedError


class Turn(torch.autograd.Function):
    """(a cos - b sin, a sin + b cos) for the halves a, b of x: two products a half, and no other buffer than the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out, half = torch.empty_like(x), x.shape[-1] // 2
        (a, b), (u, w) = x.split(half, -1), out.split(half, -1)
        torch.mul(a, cos, out=u).addcmul_(b, sin, value=-1)
        torch.mul(a, sin, out=w).addcmul_(b, cos)
        return out

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

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return self._turn(x, positions, self.stretch(), 1)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """What `map` took to x."""
        return self._turn(x, positions, 1 / self.stretch(), -1)

    def _turn(self, x: Tensor, positions: Tensor, by: float, way: int) -> Tensor:
        d = x.shape[-1]
        if d % 2:
            raise NotSupported(f"{self.name} turns pairs of channels: head_dim must be even, got {d}")
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = self.angles(positions, d)
        return Turn.apply(x.to(wide), (by * angle.cos()).to(wide), (way * by * angle.sin()).to(wide)).to(
            x.dtype
        )


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
class Standardize(TokenMap):
    """Centre each head vector and divide by its deviation, with no learned scale."""

    eps: float = arg(1e-5, above=0.0)

    name = "standardize"

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
