"""Short round trips through points in the plane: the travelling salesman."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 13  # most points that the exact answer is worked out for; its cost doubles with each


def tour_length(points: Tensor, order: Tensor) -> Tensor:
    """The length (size,) of the closed tour through points (size, n, 2) in an order (size, n) of all of them."""
    if not torch.equal(
        order.sort(1).values, torch.arange(points.shape[1], device=order.device).expand(len(points), -1)
    ):
        raise ValueError("tour_length: each row of order must name each point once")
    stops = points.gather(1, order[..., None].expand_as(points))
    return (stops - stops.roll(-1, 1)).norm(dim=-1).sum(1)


def shortest_tour(points: Tensor) -> Tensor:
    """The shortest tours (size, n) from point 0, in the direction whose second stop has the lower index.

    Dynamic programming over sets of visited points (Held and Karp, A Dynamic Programming Approach to Sequencing
    Problems, 1962).
    """
    size, n = points.shape[:2]
    if not 3 <= n <= EXACT:
        raise ValueError(
            f"shortest tours are worked out for 3 to {EXACT} points, got {n}; compare with `nearest_tour` instead"
        )
    apart = (points[:, :, None] - points[:, None]).double().norm(dim=-1)
    start, between = apart[:, 0, 1:], apart[:, 1:, 1:]
    best = torch.full(
        (size, 2 ** (n - 1), n - 1), math.inf, dtype=torch.float64
    )  # by points visited, last point
    came = torch.zeros(size, 2 ** (n - 1), n - 1, dtype=torch.long)
    bits = 2 ** torch.arange(n - 1)
    best[:, bits, torch.arange(n - 1)] = start
    for visited in range(1, 2 ** (n - 1) - 1):
        new = torch.nonzero(visited & bits == 0)[:, 0]
        step = (best[:, visited, :, None] + between[:, :, new]).min(1)
        best[:, visited | bits[new], new] = step.values
        came[:, visited | bits[new], new] = step.indices
    rows, left = torch.arange(size), torch.full((size,), 2 ** (n - 1) - 1)
    last = (best[:, -1] + start).argmin(1)
    stops = [last]
    for _ in range(n - 2):
        left, last = left - bits[last], came[rows, left, last]
        stops.append(last)
    order = torch.stack(stops, 1) + 1
    order = torch.where(order[:, :1] < order[:, -1:], order, order.flip(1))
    return torch.cat((torch.zeros(size, 1, dtype=torch.long), order), 1)


def nearest_tour(points: Tensor) -> Tensor:
    """Tours (size, n) from point 0, always on to the nearest point that is left."""
    apart = (points[:, :, None] - points[:, None]).norm(dim=-1)
    rows, here = torch.arange(len(points)), torch.zeros(len(points), dtype=torch.long)
    left = torch.ones(points.shape[:2], dtype=torch.bool)
    stops = [here]
    for _ in range(points.shape[1] - 1):
        left[rows, here] = False
        here = apart[rows, here].masked_fill(~left, math.inf).argmin(1)
        stops.append(here)
    return torch.stack(stops, 1)


@dataclass(frozen=True)
class Tour:
    """`points` uniform on the unit square; the answer is their shortest round trip. The metric is the mean `tour_length`."""

    points: int = 10

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ValueError(f"a tour needs at least 3 points, got {self.points}")

    @property
    def chance(self) -> float:
        """Mean length of a tour in random order: the mean distance of two points of the square, `points` times."""
        return self.points * (2 + math.sqrt(2) + 5 * math.asinh(1)) / 15

    def baseline(self, points: Tensor) -> float:
        """Mean length of always going on to the nearest point."""
        return float(tour_length(points, nearest_tour(points)).mean())

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Points (size, points, 2) float32 without an answer, for any number of points."""
        return torch.rand(size, self.points, 2, generator=generator)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (size, points, 2) float32 and their shortest tours (size, points) int64."""
        points = self.draw(size, generator)
        return points, shortest_tour(points)
