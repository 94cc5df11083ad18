"""Tours: the shortest against trying all orders, lengths by hand, chance in closed form."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from saccade.tasks.tour import Tour, nearest_tour, shortest_tour, tour_length
from tasks.helpers import repeatable, seeded

SQUARE = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])


def test_small_example() -> None:
    assert shortest_tour(SQUARE).tolist() == [[0, 2, 1, 3]]
    assert tour_length(SQUARE, torch.tensor([[0, 2, 1, 3]])).item() == 4
    crossed = tour_length(SQUARE, torch.tensor([[0, 1, 2, 3]]))
    assert crossed.item() == pytest.approx(2 + 2 * math.sqrt(2))


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_no_order_is_shorter(count: int) -> None:
    points, best = Tour(count).batch(20, seeded())
    every = torch.tensor([[0, *rest] for rest in permutations(range(1, count))])
    lengths = torch.stack([tour_length(points, order.expand(20, count)) for order in every])
    assert torch.allclose(tour_length(points, best), lengths.min(0).values)
    assert (best[:, 0] == 0).all()
    assert (best[:, 1] < best[:, -1]).all()


def test_nearest_tour_goes_on_to_the_nearest() -> None:
    line = torch.tensor([[[0.0, 0.0], [0.9, 0.0], [0.2, 0.0], [-0.5, 0.0]]])
    assert nearest_tour(line).tolist() == [[0, 2, 1, 3]]
    points = Tour(8).draw(50, seeded())
    for row, order in zip(points.tolist(), nearest_tour(points).tolist(), strict=True):
        left, here = set(range(1, 8)), 0
        for stop in order[1:]:
            assert stop == min(left, key=lambda i: math.dist(row[i], row[here]))
            left.remove(stop)
            here = stop


@pytest.mark.parametrize("count", [3, 10, 20])
def test_chance_is_the_mean_length_in_random_order(count: int) -> None:
    task = Tour(count)
    points = task.draw(4000, seeded())
    lengths = tour_length(points, torch.arange(count).expand(4000, count))
    assert abs(float(lengths.mean()) - task.chance) < 4 * float(lengths.std()) / math.sqrt(4000)


def test_baseline_lies_between_the_shortest_and_chance() -> None:
    task = Tour(9)
    points, best = task.batch(200, seeded())
    assert float(tour_length(points, best).mean()) < task.baseline(points) < task.chance
    few = Tour(3)
    assert few.baseline(few.draw(100, seeded())) == pytest.approx(
        float(tour_length(few.draw(100, seeded()), torch.arange(3).expand(100, 3)).mean())
    )


def test_same_seed_same_batch() -> None:
    assert repeatable(Tour(7))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        Tour(2)
    with pytest.raises(ValueError, match="3 to 13 points, got 14; compare with `nearest_tour`"):
        Tour(14).batch(1, seeded())
    with pytest.raises(ValueError, match="name each point once"):
        tour_length(SQUARE, torch.tensor([[0, 1, 1, 3]]))
    with pytest.raises(ValueError, match="name each point once"):
        tour_length(SQUARE, torch.tensor([[0, 1, 3]]))
