"""The value at the least key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.tasks.argmin import ArgMin
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [ArgMin(), ArgMin(items=2, values=3), ArgMin(items=1, values=2)]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def test_small_example() -> None:
    """Two items with values 1 and 0: the answer is the value of whichever key is less."""
    items, answers = ArgMin(items=2, values=2).batch(100, seeded())
    crossed = [
        (row, answer)
        for row, answer in zip(items.tolist(), answers.tolist(), strict=True)
        if row[0][1:] == [0, 1] and row[1][1:] == [1, 0]
    ]
    assert {answer for _, answer in crossed} == {0, 1}
    assert all(answer == (1 if row[0][0] < row[1][0] else 0) for row, answer in crossed)


@each_task
def test_plain_code_answers_all(task: ArgMin) -> None:
    assert accuracy(task, by_row(lambda row, _: min(row)[1:].index(1))) == 1
    items, answers = task.batch(300, seeded())
    assert items.shape == (300, task.items, task.width)
    assert (items[..., 1:].sum(-1) == 1).all()
    assert items.min() >= 0
    assert items.max() <= 1
    assert set(answers.tolist()) == set(range(task.values))


@each_task
def test_chance_and_baseline(task: ArgMin) -> None:
    def usual(items: Tensor, _: Tensor) -> Tensor:
        return items[:, :, 1:].sum(1).argmax(1)

    assert agrees(task.chance, task, lambda x, y: torch.zeros_like(y), size=1000)
    assert agrees(task.baseline, task, usual, size=1000)


def test_same_seed_same_batch() -> None:
    assert repeatable(ArgMin())


@pytest.mark.parametrize(("wrong", "words"), [({"items": 0}, "got 0 items"), ({"values": 1}, "1 values")])
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArgMin(**wrong)
