"""Convex hulls: against a picture worked out by hand, against scipy, and against what chance says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from saccade.tasks.hull import Hull, hull, same_set
from saccade.tasks.metric import exact_match
from saccade.tasks.recall import SILENT
from tasks.helpers import repeatable, seeded


def test_small_example() -> None:
    """A square, a point inside, and one in the middle of an edge."""
    points = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert hull(points) == [1, 5, 2, 4]


def test_equals_scipy() -> None:
    task, seen = Hull(3, 9), set()
    for seed in range(40):
        points, targets = task.batch(8, seeded(seed))
        count = points.shape[1]
        seen.add(count)
        for row, target in zip(points, targets.tolist(), strict=True):
            corners = ConvexHull(row.double().numpy()).vertices.tolist()
            first = corners.index(min(corners))
            wanted = [*corners[first:], *corners[:first], count]
            assert target == wanted + [SILENT] * (count + 1 - len(wanted))
    assert seen == set(range(3, 10))


def test_every_corner_turns_left_and_holds_all_points() -> None:
    points, targets = Hull(8, 8).batch(50, seeded())
    for row, target in zip(points.double(), targets.tolist(), strict=True):
        corners = row[[i for i in target if 0 <= i < 8]]
        edge = corners.roll(-1, 0) - corners
        to = row[None] - corners[:, None]
        assert (edge[:, None, 0] * to[..., 1] - edge[:, None, 1] * to[..., 0] > -1e-12).all()
        assert target[0] == min(i for i in target if i >= 0)


def test_same_set_ignores_order_and_what_comes_after_the_end() -> None:
    targets = torch.tensor([[0, 3, 1, 4, SILENT], [0, 1, 2, 3, 4]])
    assert same_set(targets, targets, 4) == 1
    assert same_set(torch.tensor([[1, 0, 3, 4, 2], [3, 2, 1, 0, 0]]), targets, 4) == 1
    assert same_set(torch.tensor([[1, 0, 4, 3, 2], [3, 2, 1, 0, 4]]), targets, 4) == 0.5
    assert exact_match(torch.tensor([[0, 3, 1, 4, 2], [3, 2, 1, 0, 4]]), targets) == 0.5


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_chance_of_all_points_has_a_closed_form(count: int) -> None:
    """Up to six points the best guess is all of them, in convex position as Valtr (1995) computed."""
    expected = (math.comb(2 * count - 2, count - 1) / math.factorial(count)) ** 2
    assert Hull(count, count).chance == pytest.approx(expected, abs=0.03)
    targets = Hull(count, count).batch(2000, seeded(5))[1]
    found = torch.arange(count).expand(2000, count)
    assert same_set(found, targets, count) == pytest.approx(Hull(count, count).chance, abs=0.05)


def test_no_fixed_set_beats_chance() -> None:
    task = Hull(7, 7)
    targets = task.batch(4000, seeded(5))[1]
    rng = np.random.default_rng(0)
    scores = []
    for corners in (3, 4, 5, 6, 7):
        guess = torch.tensor(rng.permutation(7)[:corners]).expand(4000, corners)
        scores.append(same_set(guess, targets, 7))
    assert max(scores) == pytest.approx(task.chance, abs=0.015)


def test_baseline_answers_the_four_extremes() -> None:
    task = Hull(6, 6)
    points, targets = task.batch(1000, seeded())
    right = 0
    for row, target in zip(points.tolist(), targets.tolist(), strict=True):
        places = range(len(row))
        extremes = {f(places, key=lambda i: row[i][axis]) for axis in (0, 1) for f in (min, max)}
        right += extremes == {i for i in target if 0 <= i < 6}
    assert task.baseline(points, targets) == pytest.approx(right / 1000)
    assert 0.1 < right / 1000 < 0.5


def test_same_seed_same_batch() -> None:
    assert repeatable(Hull(8, 8))


@pytest.mark.parametrize(("shortest", "longest"), [(2, 5), (6, 5)])
def test_bad_arguments(shortest: int, longest: int) -> None:
    with pytest.raises(ValueError, match=f"3 <= shortest <= longest, got {shortest} and {longest}"):
        Hull(shortest, longest)
