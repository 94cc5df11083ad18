"""Neighbourhoods on grids: tokens are the cells of a line, an image or a volume, row by row.

Legend: n cells on an axis, a and c the coordinates of query and key on it; all of them inside one class of dilation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.algebra import Interval, Mask, Span, merge_spans
from saccade.parts.base import arg


@dataclass(frozen=True)
class Axis:
    """What one axis of a grid reads: each query the window of its group of `stride` queries.

    Coordinates that are equal modulo `dilation` form a class, in which everything happens as if it were alone.
    """

    size: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    shift: bool = True

    def members(self, group: Tensor | int) -> Tensor | int:
        """How many coordinates the class `group` has."""
        return (self.size - group + self.dilation - 1) // self.dilation

    def bounds(self, a: Tensor, n: Tensor | int) -> tuple[Tensor, Tensor]:
        """First key and one past the last, (first, end), of the query a among the n of its class.

        The window of a group is that of its centre, or of its last query where the axis is causal. It moves inwards
        at a border, or is cut there. (Hassani et al., Generalized Neighborhood Attention, 2025.)
        """
        first = a // self.stride * self.stride
        if self.causal:
            last = (first + self.stride - 1).clamp(max=n - 1) if self.shift else first + self.stride - 1
            return (last - self.window + 1).clamp(min=0), a + 1
        centre = first + self.stride // 2
        if not self.shift:
            start = centre - self.window // 2
            return start.clamp(min=0), (start + self.window).clamp(max=n)
        start = (centre.clamp(max=n - 1) - self.window // 2).clamp(min=0)
        start = torch.minimum(start, torch.as_tensor(n - self.window))
        return start, start + self.window

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the coordinate i reads the coordinate j."""
        d = self.dilation
        first, end = self.bounds(i // d, self.members(i % d))
        c = j // d
        near = (c >= first) & (c < end)
        return near & (i % d == j % d) if d > 1 else near

    def reach(self, lo: int, hi: int) -> Span:
        """The coordinates that those of [lo, hi) may read lie in this interval."""
        d, i = self.dilation, torch.arange(lo, hi)
        first, end = self.bounds(i // d, self.members(i % d))
        return int((first * d + i % d).min()), int(((end - 1) * d + i % d).max()) + 1


def spread(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    """A value for each axis, from one for all of them or from as many as there are."""
    if not isinstance(value, tuple):
        return (value,) * axes
    if len(value) != axes:
        raise MechanismError(
            f"na: {name} has {len(value)} values for {axes} axes; give one an axis, or one for all"
        )
    return value


@dataclass(frozen=True)
class GridNeighborhood(Mask):
    """The `window` cells around the own one on every axis of a grid, `dilation` apart.

    One number is meant for every axis, several are an axis each. `stride` queries in a row share the window of the one
    in their middle: a stride of the window's size gives blocks. On a causal axis no later coordinate is read, so with
    all axes causal no later cell is. Where a window meets a border it moves inwards (`shift`: every query reads as many
    keys) or is cut (`drop`). Of an even window the larger half lies before its query. (Hassani et al., Neighborhood
    Attention Transformer, 2023, and Generalized Neighborhood Attention, 2025.)
    """

    window: int | tuple[int, ...] = arg(7, at_least=1)
    stride: int | tuple[int, ...] = arg(1, at_least=1)
    dilation: int | tuple[int, ...] = arg(1, at_least=1)
    causal_axes: bool | tuple[bool, ...] = False
    border: str = arg("shift", choices=("shift", "drop"))
    grid: tuple[int, ...] | None = arg(None, at_least=1)

    name = "na"

    def __post_init__(self) -> None:
        super().__post_init__()
        for window, stride, dilation, causal, size in self._settings():
            if stride > window:
                raise MechanismError(
                    f"na: {stride} queries cannot share a window of {window}: a stride is at most the window"
                )
            room = max(1, size // dilation) if size else window
            if window > room and self.border == "shift" and not causal:
                raise MechanismError(
                    f"na: a window of {window}, {dilation} apart, spans {window * dilation} cells and the axis has {size}, "
                    f"so it cannot move inwards; take a window of at most {room}, or border=drop, which cuts it"
                )

    @property
    def dims(self) -> int | None:
        """How many axes the arguments name; None where one value stands for all."""
        given = (self.grid, self.window, self.stride, self.dilation, self.causal_axes)
        return next((len(x) for x in given if isinstance(x, tuple)), None)

    def _settings(self) -> Iterator[tuple[int, int, int, bool, int]]:
        names = ("window", "stride", "dilation", "causal_axes")
        n = self.dims or 1
        return zip(*(spread(x, getattr(self, x), n) for x in names), self.grid or (0,) * n, strict=True)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Each axis of the grid. Raises NotSupported where no grid was given."""
        if self.grid is None:
            raise ValueError(
                f"{self} reads neighbours on a grid: give one, as in attend(..., grid=(height, width))"
            )
        return _axes(self)

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        return self.causal_axes is True or (isinstance(self.causal_axes, tuple) and all(self.causal_axes))

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        found: Tensor | None = None
        rest = math.prod(self.grid or ())
        for axis in self.axes:
            rest //= axis.size
            near = axis.exist(i // rest % axis.size, j // rest % axis.size)
            found = near if found is None else found & near
        assert found is not None
        return found

    def intervals(self, i: Tensor, keys: int) -> list[Interval] | None:
        first, *others = self.axes
        return [first.bounds(i, first.size)] if not others and first.dilation == 1 else None

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        first, *others = self.axes
        line = math.prod(a.size for a in others)
        lo, hi = first.reach(i0 // line, -(-i1 // line))
        return merge_spans([(min(keys, lo * line), min(keys, hi * line))])


@functools.lru_cache(maxsize=1024)
def _axes(mask: GridNeighborhood) -> tuple[Axis, ...]:
    shift = mask.border == "shift"
    return tuple(Axis(n, w, s, d, bool(c), shift) for w, s, d, c, n in mask._settings())
