"""Induction: a token that was seen asks for what followed it the last time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.tasks.induction import Induction
from saccade.tasks.recall import SILENT
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Induction(),
    Induction(length=9, symbols=3),
    Induction(repeated=True),
    Induction(10, 30, repeated=True),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def followed(row: list[int], _: list[int]) -> list[int]:
    answers = []
    for at, token in enumerate(row):
        seen = [before for before in range(at) if row[before] == token]
        answers.append(row[seen[-1] + 1] if seen else SILENT)
    return answers


def test_small_example() -> None:
    tokens, targets = Induction(length=5, symbols=3).batch(3000, seeded())
    row = tokens.tolist().index([0, 1, 0, 0, 1])
    assert targets[row].tolist() == [SILENT, SILENT, 1, 0, 0]


@each_task
def test_plain_code_answers_all(task: Induction) -> None:
    tokens, targets = task.batch(200, seeded())
    assert torch.equal(by_row(followed)(tokens, targets), targets)
    assert accuracy(task, by_row(followed)) == 1


def test_repeated_asks_for_the_second_half_itself() -> None:
    task = Induction(length=12, symbols=8, repeated=True)
    tokens, targets = task.batch(200, seeded())
    assert torch.equal(tokens[:, :6], tokens[:, 6:])
    assert all(len(set(row[:6])) == 6 for row in tokens.tolist())
    assert (targets[:, :6] == SILENT).all()
    assert torch.equal(targets[:, 6:-1], tokens[:, 7:])


@each_task
def test_chance_and_baseline(task: Induction) -> None:
    generator = seeded(9)

    def one_seen(x: Tensor, _: Tensor) -> Tensor:
        """At each place a random one of the different symbols up to it."""
        shown = torch.nn.functional.one_hot(x, task.symbols).cumsum(1) > 0
        return (shown * torch.rand(shown.shape, generator=generator)).argmax(-1)

    assert agrees(task.chance, task, lambda x, y: torch.ones_like(y))
    if task.repeated:
        assert task.baseline == 2 / task.length
    assert agrees(task.baseline, task, one_seen)


def test_same_seed_same_batch() -> None:
    assert repeatable(Induction())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"length": 1}, "at least 2 tokens"),
        ({"symbols": 1}, "2 symbols"),
        ({"repeated": True, "length": 7}, "even length"),
        ({"repeated": True, "length": 34}, "at most 32 for 16 symbols, got 34"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Induction(**wrong)
