"""Nearest key: the value that stands at the query's own place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.tasks.nearest import NearestKey
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [NearestKey(), NearestKey(keys=2, grid=2, values=3), NearestKey(keys=5, grid=30, values=2)]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def test_small_example() -> None:
    """Three keys on a grid of three points; the query is the place of the key that has value 1."""
    tokens, targets = NearestKey(keys=3, grid=3, values=2).batch(500, seeded())
    wanted = [[0.0, 1, 0], [-1.0, 0, 1], [1.0, 1, 0], [-1.0, 0, 0]]
    assert targets[tokens.tolist().index(wanted)] == 1


@each_task
def test_plain_code_answers_all(task: NearestKey) -> None:
    def nearest(row: list[list[float]], _: list[int]) -> int:
        *keys, query = row
        key = min(keys, key=lambda k: abs(k[0] - query[0]))
        return key[1:].index(1)

    assert accuracy(task, by_row(nearest)) == 1
    tokens, targets = task.batch(300, seeded())
    assert tokens.shape == (300, task.keys + 1, task.width)
    assert (tokens[:, :-1, 1:].sum(-1) == 1).all()
    assert (tokens[:, -1, 1:] == 0).all()
    places = (tokens[:, :-1, 0] + 1) * (task.grid - 1) / 2
    assert torch.allclose(places, places.round(), atol=1e-5)
    assert all(len(set(row)) == task.keys for row in places.round().tolist())
    assert set(places.round().flatten().tolist()) == set(range(task.grid))
    assert set(targets.tolist()) == set(range(task.values))


@each_task
def test_chance_and_baseline(task: NearestKey) -> None:
    def usual(tokens: Tensor, _: Tensor) -> Tensor:
        return tokens[:, :, 1:].sum(1).argmax(1)

    assert agrees(task.chance, task, lambda x, y: torch.zeros_like(y), size=1000)
    assert agrees(task.baseline, task, usual, size=1000)


def test_same_seed_same_batch() -> None:
    assert repeatable(NearestKey())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keys": 10}, "1 to 9 keys.*10 keys"),
        ({"keys": 0}, "0 keys"),
        ({"grid": 1, "keys": 1}, "at least 2 points"),
        ({"values": 1}, "1 values"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NearestKey(**wrong)
