"""Rotary positions stretched beyond the trained length, and along the axes of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError, NotSupported
from saccade.parts.base import arg
from saccade.parts.tokens import Rotary, rope_rates


@dataclass(frozen=True)
class RopeLinear(Rotary):
    """Rope at position / factor (Chen et al., Extending Context Window of LLMs via Positional Interpolation, 2023)."""

    factor: float = arg(at_least=1.0)
    base: float = arg(10000.0, above=0.0)

    name = "rope_linear"

    def rates(self, d: int, device: torch.device) -> Tensor:
        return rope_rates(self.base, d, device) / self.factor


@dataclass(frozen=True)
class RopeNtk(Rotary):
    """Rope with base * factor^(d/(d - 2)): the slowest pair turns `factor` times slower, the fastest as before.

    (NTK-aware scaling, as in Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023.)
    """

    factor: float = arg(at_least=1.0)
    base: float = arg(10000.0, above=0.0)

    name = "rope_ntk"

    def rates(self, d: int, device: torch.device) -> Tensor:
        if d < 4:
            raise NotSupported(f"rope_ntk sets two pairs apart: head_dim must be at least 4, got {d}")
        return rope_rates(self.base * self.factor ** (d / (d - 2)), d, device)


@dataclass(frozen=True)
class RopeYarn(Rotary):
    """Pairs that turn more than `fast` times in `length` tokens keep their rate, below `slow` it is divided by factor.

    Between them the share is linear in the number of turns; q and k are multiplied by 0.1 ln(factor) + 1, which divides
    the temperature of the logits. `length` is that of training. (Peng et al., YaRN: Efficient Context Window Extension of
    Large Language Models, 2023.)
    """

    factor: float = arg(at_least=1.0)
    length: int = arg(2048, at_least=1)
    base: float = arg(10000.0, above=0.0)
    slow: float = arg(1.0, above=0.0)
    fast: float = arg(32.0, above=0.0)

    name = "rope_yarn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fast <= self.slow:
            raise MechanismError(f"rope_yarn: fast must be above slow={self.slow:g}, got {self.fast:g}")

    def rates(self, d: int, device: torch.device) -> Tensor:
        rates = rope_rates(self.base, d, device)
        turns = self.length * rates / (2 * math.pi)
        kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return rates * (kept + (1 - kept) / self.factor)

    def stretch(self) -> float:
        return 0.1 * math.log(self.factor) + 1


@dataclass(frozen=True)
class AxialRope(Rotary):
    """Rope along each axis of a grid: the pairs are shared out evenly, each share turns by its own coordinate.

    The rates of a share of p pairs are base^(-m/p). (Heo et al., Rotary Position Embedding for Vision Transformer, 2024.)
    """

    base: float = arg(100.0, above=0.0)
    grid: tuple[int, ...] | None = arg(None, at_least=1)

    name = "axial_rope"

    def angles(self, positions: Tensor, d: int) -> Tensor:
        if not self.grid:
            raise NotSupported(
                "axial_rope needs the sizes of the axes: attend(..., grid=(h, w)) or axial_rope(grid=(h, w))"
            )
        axes = len(self.grid)
        if d % (2 * axes):
            raise NotSupported(
                f"axial_rope shares pairs of channels among {axes} axes: head_dim must be a multiple of {2 * axes}, got {d}"
            )
        rates = rope_rates(self.base, d // axes, positions.device)
        return torch.cat([x[:, None, :, None].double() * rates for x in unravel(positions, self.grid)], -1)


def unravel(positions: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """The coordinate along each axis of tokens that are the cells of a grid, row by row."""
    found = []
    for size in reversed(grid[1:]):
        found.append(positions % size)
        positions = torch.div(positions, size, rounding_mode="floor")
    return [positions, *reversed(found)]
