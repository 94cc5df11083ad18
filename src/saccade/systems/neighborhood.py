"""Neighbourhoods on lines, images and volumes, and how many tiles they touch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Mechanism, Pairwise, system
from saccade.mechanism import mechanism as parse
from saccade.parts.algebra import Pairs
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.grid import Axis, GridNeighborhood
from saccade.parts.logits import Logits, Slots
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

    def slots(self, pairs: Pairs) -> Slots | None:
        if self.grid is None:
            return None
        at, near = _places(self, pairs)
        return Slots(at, near.shape[1])

    def terms(self, q: Tensor, params: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        tables = torch.cat([params[f"rel_axis_{a}"] for a in range(self.axes)], 1).to(q.dtype)
        every = q @ tables.transpose(-1, -2)
        return every.gather(-1, _places(self, pairs)[1].expand(*q.shape[:2], -1, -1))

    def tile(self, s: Tensor, t: Tile) -> Tensor:
        q, rest = t.q.to(s.dtype), math.prod(self.grid or ())
        for a, size in enumerate(self.grid or ()):
            rest //= size
            offset = t.j // rest % size - t.i // rest % size
            terms = q @ t.params[f"rel_axis_{a}"].to(s.dtype).transpose(-1, -2)
            s = s + terms.gather(-1, (offset.clamp(-self.span, self.span) + self.span).expand(s.shape))
        return s


@functools.lru_cache(maxsize=32)
def _places(part: AxialTable, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The slots of keys, (keys, axes) int32, and the row of all tables, one below the other, in each slot of a query.

    What a query reads on an axis lies in a window of w coordinates, so the slot of a coordinate is its rest modulo w.
    """
    assert part.grid is not None
    follows = isinstance(pairs, GridNeighborhood) and pairs.grid == part.grid
    cells, rest, begin = torch.arange(math.prod(part.grid)), math.prod(part.grid), 0
    at, near = [], []
    for a, size in enumerate(part.grid):
        rest //= size
        own, first, width = cells // rest % size, torch.zeros_like(cells), size
        axis = pairs.axes[a] if isinstance(pairs, GridNeighborhood) and follows else None
        if axis is not None and axis.dilation == 1:
            first, width = axis.bounds(own, size)[0], min(size, axis.window)
        at.append(begin + own % width)
        coordinate = first[:, None] + (torch.arange(width) - first[:, None]) % width
        near.append((coordinate - own[:, None]).clamp(-part.span, part.span) + part.span)
        near[-1] += a * (2 * part.span + 1)
        begin += width
    return torch.stack(at, 1).to(torch.int32), torch.cat(near, 1)


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
