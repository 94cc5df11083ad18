"""Brackets: all strings are balanced, alike likely and not too deep; what closes is what was opened last."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from saccade.tasks.dyck import Dyck
from saccade.tasks.recall import SILENT
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Dyck(),
    Dyck(length=120, kinds=3),
    Dyck(length=6, kinds=2, depth=2),
    Dyck(length=10, kinds=1, depth=1),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def closes(task: Dyck, row: list[int]) -> list[int]:
    """The bracket that would close after each token, where the next one closes."""
    answers, stack = [], []
    for at, token in enumerate(row):
        if token < task.kinds:
            stack.append(token)
        else:
            stack.pop()
        closing = at + 1 < len(row) and row[at + 1] >= task.kinds
        answers.append(stack[-1] + task.kinds if closing else SILENT)
    return answers


def test_small_example() -> None:
    """( is 0, [ is 1, ) is 2, ] is 3."""
    task = Dyck(length=6, kinds=2)
    tokens, targets = task.batch(2000, seeded())
    row = tokens.tolist().index([1, 0, 2, 3, 0, 2])
    assert targets[row].tolist() == [SILENT, 2, 3, SILENT, 2, SILENT]
    assert task.depths(tokens[row]).tolist() == [1, 2, 1, 0, 1, 0]
    rows = torch.tensor([[1, 0, 2, 3], [1, 0, 3, 2], [2, 0, 2, 0], [0, 0, 2, 0], [0, 2, 1, 3]])
    assert task.balanced(rows).tolist() == [True, False, False, False, True]


@each_task
def test_plain_code_answers_all(task: Dyck) -> None:
    assert accuracy(task, by_row(lambda x, _: closes(task, x))) == 1
    tokens, targets = task.batch(300, seeded())
    assert task.balanced(tokens).all()
    depths = task.depths(tokens)
    assert depths.min() == 0
    assert depths.max() <= task.depth
    assert (depths[:, -1] == 0).all()
    assert ((targets != SILENT).sum(1) == task.length // 2).all()


@pytest.mark.parametrize(
    ("task", "strings"), [(Dyck(8, kinds=1, depth=3), 13), (Dyck(4, kinds=2), 8)], ids=str
)
def test_all_strings_are_alike_likely(task: Dyck, strings: int) -> None:
    """Four pairs have 14 shapes, one of them too deep; two pairs have 2 shapes, each of 4 choices of kinds."""
    rows = Counter(map(tuple, task.batch(1000 * strings, seeded())[0].tolist()))
    assert len(rows) == strings
    assert all(abs(count - 1000) < 4.5 * 1000**0.5 for count in rows.values())


def test_long_and_deep_strings_are_drawn() -> None:
    task = Dyck(length=2000, kinds=2, depth=100)
    assert task.balanced(task.batch(3, seeded())[0]).all()
    assert 0.6 < task.baseline < 0.8


@each_task
def test_chance_and_baseline(task: Dyck) -> None:
    generator = seeded(9)

    def guess(_: Tensor, y: Tensor) -> Tensor:
        return torch.randint(task.kinds, y.shape, generator=generator) + task.kinds

    assert agrees(task.chance, task, guess)
    assert agrees(task.baseline, task, lambda x, y: x % task.kinds + task.kinds)
    assert task.chance <= task.baseline


def test_same_seed_same_batch() -> None:
    assert repeatable(Dyck())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"length": 7}, "even length of at least 2, got 7"),
        ({"length": 0}, "got 0"),
        ({"kinds": 0}, "got 0 kinds"),
        ({"depth": 0}, "depth 0"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Dyck(**wrong)
