"""What the contract checks are run on: a mechanism with seeded tensors, and how a result is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Shape
from saccade.mechanism import Combine, Mechanism, Named, Pairwise, draw_named
from saccade.parts.base import Sizes
from saccade.parts.selection import Selection
from saccade.plan import Attended, attend

BATCH, HEADS, LENGTH, HEAD_DIM, VALUE_DIM = 2, 4, 160, 16, 8


class Skip(Exception):
    """A property does not apply; the text says why."""


class Failed(AssertionError):
    """A property does not hold; the text says by how much."""


@dataclass
class Subject:
    """A mechanism with seeded tensors of the right kinds, on a grid of as many cells as tokens where it asks for one."""

    given: Mechanism
    seed: int
    device: str
    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    length: int = LENGTH
    mechanism: Mechanism = field(init=False)
    groups: int = field(init=False)

    def __post_init__(self) -> None:
        self.mechanism = on_tokens(self.given, self.length)
        self.groups = self.mechanism.kv_heads(HEADS)

    @property
    def slots(self) -> bool:
        return isinstance(self.mechanism, Pairwise) and self.mechanism.slots is not None

    @property
    def selects(self) -> bool:
        return any(getattr(p, "choose", None) is not None for p in self.mechanism.parts())

    def qkv(
        self,
        length: int = LENGTH,
        dtype: torch.dtype = torch.float64,
        groups: int | None = None,
        seed: int = 0,
    ) -> list[Tensor]:
        """q, k, v of one call."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        g = self.groups if groups is None else groups
        rows = 1 if self.mechanism.learned_query else length
        shapes = ((BATCH, HEADS, rows, HEAD_DIM), (BATCH, g, length, HEAD_DIM), (BATCH, g, length, VALUE_DIM))
        return [
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(self.device) for s in shapes
        ]

    def named(
        self, length: int = LENGTH, dtype: torch.dtype = torch.float64, groups: int | None = None
    ) -> Named:
        """params, streams and buffers of one call."""
        sizes = Sizes(HEADS, self.groups if groups is None else groups, HEAD_DIM, VALUE_DIM)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return draw_named(
            self.mechanism, sizes, BATCH, length, generator, off=0.1, dtype=dtype, device=self.device
        )

    def out(self, qkv: list[Tensor], named: Named, **options: Any) -> Tensor:
        """The output alone."""
        found = attend(qkv[0], qkv[1], qkv[2], self.mechanism, **named, **options)
        return found.out if isinstance(found, Attended) else found

    def selection(self, qkv: list[Tensor], named: Named, **options: Any) -> Selection | None:
        """What the mechanism chooses, to freeze it; None for one that chooses nothing."""
        if not self.selects:
            return None
        if isinstance(self.mechanism, Combine):
            raise Skip("a choice inside a combination cannot be frozen; check its members alone")
        return attend(
            qkv[0], qkv[1], qkv[2], self.mechanism, need=("selection",), **named, **options
        ).selection


def on_tokens(m: Mechanism, length: int) -> Mechanism:
    """A mechanism that asks for a grid on one of so many cells, a multiple of 32: of its own number of axes, else two."""
    if None not in m.grids:
        return m
    dims = {n for p in m.parts() if (n := getattr(p, "dims", None)) is not None} or {2}
    if len(dims) > 1:
        raise ValueError(f"{m} asks for grids of {sorted(dims)} axes at once")
    return m.on_grid({1: (length,), 2: (length // 16, 16), 3: (length // 32, 4, 8)}[dims.pop()])


def cut(named: Named, rows: slice) -> Named:
    """The same with streams of some rows only."""
    return named | {"streams": {n: x[:, :, rows] for n, x in named["streams"].items()}}


def close(got: Tensor, wanted: Tensor, what: str, budget: float = 1e-9) -> str:
    """Raise Failed unless the largest difference, relative to the scale of `wanted`, is within the budget."""
    if got.shape != wanted.shape:
        raise Failed(f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got - wanted).abs().max()) / scale if got.numel() else 0.0
    if not error <= budget:
        raise Failed(f"{what}: off by {error:.1e}, at most {budget:.1e}")
    return f"{error:.1e}"


def shape_of(s: Subject, length: int = LENGTH) -> Shape:
    return Shape(
        BATCH, HEADS, 1 if s.mechanism.learned_query else length, HEAD_DIM, s.groups, length, VALUE_DIM
    )
