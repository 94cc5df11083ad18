"""The token to the left: what it is, and whether it is the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from saccade.tasks.previous import Previous
from saccade.tasks.recall import SILENT
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Previous(),
    Previous(length=9, symbols=3, lag=3),
    Previous(length=4, symbols=5, lag=3),
    Previous(equal=True, symbols=2),
    Previous(length=12, symbols=3, lag=2, equal=True),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def left(task: Previous, row: list[int]) -> list[int]:
    answers = []
    for at, token in enumerate(row):
        if at < task.lag:
            answers.append(SILENT)
        else:
            answers.append(int(token == row[at - task.lag]) if task.equal else row[at - task.lag])
    return answers


def test_small_example() -> None:
    tokens, targets = Previous(length=4, symbols=3, lag=2).batch(2000, seeded())
    assert targets[tokens.tolist().index([2, 1, 0, 0])].tolist() == [SILENT, SILENT, 2, 1]
    tokens, targets = Previous(length=4, symbols=2, equal=True).batch(200, seeded())
    assert targets[tokens.tolist().index([1, 1, 0, 0])].tolist() == [SILENT, 1, 0, 1]


@each_task
def test_plain_code_answers_all(task: Previous) -> None:
    tokens, targets = task.batch(300, seeded())
    assert torch.equal(by_row(lambda x, _: left(task, x))(tokens, targets), targets)
    assert accuracy(task, by_row(lambda x, _: left(task, x))) == 1
    assert targets.max() < task.vocab


@each_task
def test_chance_and_baseline(task: Previous) -> None:
    def from_the_bag(row: list[int], _: list[int]) -> list[int]:
        answers = []
        for at, token in enumerate(row):
            others = Counter(row[:at] + row[at + 1 :])
            if task.equal:
                answers.append(int(others[token] > (len(row) - 1) / 2))
            else:
                answers.append(max(sorted(others), key=lambda symbol: others[symbol]))
        return answers

    assert agrees(task.chance, task, lambda x, y: torch.zeros_like(y))
    assert agrees(task.baseline, task, by_row(from_the_bag))
    assert task.chance < task.baseline


def test_same_seed_same_batch() -> None:
    assert repeatable(Previous())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lag": 0}, "lag 0"),
        ({"length": 4, "lag": 4}, "lag of 1 to length - 1.*lag 4 and length 4"),
        ({"symbols": 1}, "at least 2 symbols"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Previous(**wrong)
