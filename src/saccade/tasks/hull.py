"""The convex hull of points in the plane, by pointing at its corners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


def hull(points: Tensor) -> list[int]:
    """Corners of the hull of points (n, 2): their indices counter-clockwise from the lowest; points on an edge are none."""
    xy = points.tolist()
    order = sorted(range(len(xy)), key=lambda i: xy[i])

    def chain(indices: list[int]) -> list[int]:
        kept: list[int] = []
        for i in indices:
            while len(kept) > 1 and _turn(xy[kept[-2]], xy[kept[-1]], xy[i]) <= 0:
                kept.pop()
            kept.append(i)
        return kept[:-1]

    corners = chain(order) + chain(order[::-1])
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


def _turn(a: list[float], b: list[float], c: list[float]) -> float:
    """Twice the area of the triangle a, b, c: above 0 when it turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@dataclass(frozen=True)
class Hull:
    """`shortest` to `longest` points uniform on the unit square, the same count in all rows of a batch; answer their hull.

    A task for pointer networks (Vinyals et al., Pointer Networks, 2015). The metric is `same_set`, the share of rows whose
    corners are right in any order, or `metric.exact_match`.
    """

    shortest: int = 5
    longest: int = 8

    def __post_init__(self) -> None:
        if not 3 <= self.shortest <= self.longest:
            raise ValueError(f"a hull needs 3 <= shortest <= longest, got {self.shortest} and {self.longest}")

    @cached_property
    def chance(self) -> float:
        """Exact sets of the best fixed set, by the shares of corner counts in 4,000 draws (they have no closed form)."""
        generator = torch.Generator().manual_seed(0)
        right = 0.0
        for n in range(self.shortest, self.longest + 1):
            sizes = [len(hull(points)) for points in torch.rand(4000, n, 2, generator=generator)]
            right += max(sizes.count(m) / 4000 / math.comb(n, m) for m in range(3, n + 1))
        return right / (self.longest + 1 - self.shortest)

    def baseline(self, points: Tensor, targets: Tensor) -> float:
        """Exact sets of answering the leftmost, rightmost, lowest and highest point."""
        extremes = torch.cat((points.argmin(1), points.argmax(1)), 1)
        return same_set(extremes, targets, points.shape[1])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (size, n, 2) float32 and corners (size, n + 1) int64, then n for the end, then SILENT."""
        count = int(torch.randint(self.shortest, self.longest + 1, (1,), generator=generator))
        points = torch.rand(size, count, 2, generator=generator)
        targets = torch.full((size, count + 1), SILENT)
        for row, target in zip(points, targets, strict=True):
            corners = hull(row)
            target[: len(corners) + 1] = torch.tensor([*corners, count])
        return points, targets


def same_set(found: Tensor, targets: Tensor, count: int) -> float:
    """The share of rows that point at the same of `count` points before their first end, `count`, in whatever order."""

    def shown(rows: Tensor) -> Tensor:
        before = (rows == count).cumsum(1) == 0
        pointed = rows.new_zeros(len(rows), count + 1, dtype=torch.bool)
        return pointed.scatter(1, rows.masked_fill(~before | (rows < 0), count), True)[:, :count]

    return float((shown(found) == shown(targets)).all(1).float().mean())
