"""Neighbourhoods on lines, images and volumes, and how many tiles they touch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Mechanism, Pairwise, system
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.grid import Axis, GridNeighborhood
from saccade.parts.logits import Logits
from saccade.parts.pair import Tile


@system("fna", ref="S291")
def fna(
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Pairwise:
    """Each cell reads the `window` cells nearest to it on every axis, itself in the middle away from borders.

    The window is odd. (Hassani et al., Faster Neighborhood Attention, 2024.)
    """
    for w in window if isinstance(window, tuple) else (window,):
        if isinstance(w, int) and w > 0 and w % 2 == 0:
            raise MechanismError(
                f"fna: window must be odd, got {w}; use {w - 1} or {w + 1}, or gna(window={w})"
            )
    return Pairwise(pairs=GridNeighborhood(window, 1, dilation, causal))


@system("gna", ref="S258")
def gna(
    window: int | tuple[int, ...] = 8,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Pairwise:
    """Neighbourhoods whose queries share a window `stride` by `stride`: 1 slides, the window's own size makes blocks.

    (Hassani et al., Generalized Neighborhood Attention, 2025.) `simulate` counts the tiles that a setting touches.
    """
    return Pairwise(pairs=GridNeighborhood(window, stride, dilation, causal))


@dataclass(frozen=True)
class AxialTable(Logits):
    """s + q.(a[dy] + b[dx] + ...): a learned vector a head, axis and offset, q scaled as the score does.

    Offsets beyond `span` share the outermost vector. (Ramachandran et al., Stand-Alone Self-Attention in Vision Models,
    2019.)
    """

    span: int = arg(10, at_least=1)
    axes: int = arg(2, at_least=1)
    grid: tuple[int, ...] | None = arg(None, at_least=1)

    name = "rel_axes"
    needs = frozenset({"bilinear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None and len(self.grid) != self.axes:
            raise MechanismError(
                f"rel_axes: it has tables for {self.axes} axes and the grid {len(self.grid)}; "
                f"give rel_axes({self.span}, axes={len(self.grid)})"
            )

    @property
    def dims(self) -> int:
        """How many axes its grid has."""
        return self.axes

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        shape = (sizes.heads, 2 * self.span + 1, sizes.head_dim)
        return {f"rel_axis_{a}": Weight(shape, std=sizes.head_dim**-0.5) for a in range(self.axes)}

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 2 * self.axes * (2 * self.span + 1) * sizes.head_dim

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        q, rest = t.q.to(s.dtype), math.prod(self.grid or ())
        for a, size in enumerate(self.grid or ()):
            rest //= size
            offset = t.j // rest % size - t.i // rest % size
            terms = q @ t.params[f"rel_axis_{a}"].to(s.dtype).transpose(-1, -2)
            s = s + terms.gather(-1, (offset.clamp(-self.span, self.span) + self.span).expand(s.shape))
        return s


@system("halonet", ref="S274")
def halonet(block: int = 8, halo: int = 3, axes: int = 2) -> Pairwise:
    """Each block of `block` by `block` cells reads itself and the `halo` cells around it, with learned offsets an axis.

    A downsampling layer keeps every other row and column of the output. (Vaswani et al., Scaling Local Self-Attention for
    Parameter Efficient Visual Backbones, 2021.)
    """
    for name, value, least in (("block", block, 1), ("halo", halo, 0), ("axes", axes, 1)):
        if not isinstance(value, int) or value < least:
            raise MechanismError(f"halonet: {name} must be a whole number of at least {least}, got {value}")
    pairs = GridNeighborhood((block + 2 * halo,) * axes, (block,) * axes, border="drop")
    return Pairwise(pairs=pairs, logits=(AxialTable(max(1, block + halo - 1), axes),))


@dataclass(frozen=True)
class Simulation:
    """Key tiles that each query tile touches: (tiles,) in reading order, of `tiles` that there are."""

    touched: Tensor
    tiles: int

    @property
    def bound(self) -> float:
        """How many times faster than dense attention such tiles can be at most."""
        return self.tiles * len(self.touched) / float(self.touched.sum())


def simulate(
    mechanism: str | Mechanism, query_tile: tuple[int, ...], key_tile: tuple[int, ...]
) -> Simulation:
    """How many key tiles a kernel with tiles of these sides must visit for a neighbourhood on its grid.

    Dilated axes are tiled class by class. (Hassani et al., Generalized Neighborhood Attention, 2025.)

    >>> int(simulate(parse("gna((24,), stride=8)").on_grid((96,)), (8,), (8,)).touched[5])
    3
    """
    (pairs,) = (p for p in parse(mechanism).parts() if isinstance(p, GridNeighborhood))
    touched, tiles = torch.ones(1, dtype=torch.long), 1
    for axis, q, k in zip(pairs.axes, query_tile, key_tile, strict=True):
        found = list(_touched(axis, q, k))
        touched = (touched[:, None] * torch.tensor(found)).flatten()
        tiles *= sum(-(-int(axis.members(g)) // k) for g in range(min(axis.dilation, axis.size)))
    return Simulation(touched, tiles)


def _touched(axis: Axis, query_tile: int, key_tile: int) -> Iterator[int]:
    """How many key tiles each tile of queries touches."""
    for group in range(min(axis.dilation, axis.size)):
        count = int(axis.members(group))
        first, end = axis.bounds(torch.arange(count), count)
        for a in range(0, count, query_tile):
            lo, hi = int(first[a : a + query_tile].min()), int(end[a : a + query_tile].max())
            yield (hi - 1) // key_tile - lo // key_tile + 1
