"""Maps on single tokens of q, k or v, before any pair is formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

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


@dataclass(frozen=True)
class Rope(TokenMap):
    """Rotate pairs (x_m, x_{m + d/2}) by position * base^(-2m/d) (Su et al., RoFormer, 2021)."""

    base: float = arg(10000.0, above=0.0)

    name = "rope"
    needs = frozenset({"bilinear"})

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        d = x.shape[-1]
        if d % 2:
            raise NotSupported(f"rope turns pairs of channels: head_dim must be even, got {d}")
        wide = torch.promote_types(x.dtype, torch.float32)
        rates = torch.pow(self.base, -torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
        angle = positions[:, None, :, None].double() * rates
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Standardize(TokenMap):
    """Centre each head vector and divide by its deviation, with no learned scale."""

    eps: float = arg(1e-5, above=0.0)

    name = "standardize"

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
