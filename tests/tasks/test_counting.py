"""Counting: how many `a` came since the last reset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.tasks.counting import Counting
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Counting(),
    Counting(length=5, most=2, share=0.5, reset=0.3),
    Counting(length=12, most=12, reset=0),
    Counting(length=8, share=0.6, reset=0.4),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def count(task: Counting, row: list[int]) -> list[int]:
    answers, number = [], 0
    for token in row:
        number = 0 if token == task.a + 1 else number + (token == task.a)
        answers.append(min(number, task.most))
    return answers


def test_small_example() -> None:
    """Answers 0 to 2, so `a` is 3, reset 4 and the filler 5."""
    tokens, targets = Counting(length=7, most=2, share=0.5, reset=0.2, fillers=1).batch(20000, seeded())
    row = tokens.tolist().index([3, 5, 3, 3, 4, 5, 3])
    assert targets[row].tolist() == [1, 1, 2, 2, 0, 0, 1]


@each_task
def test_plain_code_answers_all(task: Counting) -> None:
    assert accuracy(task, by_row(lambda x, _: count(task, x))) == 1
    tokens, targets = task.batch(500, seeded())
    assert tokens.min() >= task.a
    assert tokens.max() < task.vocab
    assert targets.min() == 0
    assert targets.max() <= task.most
    assert float((tokens == task.a).float().mean()) == pytest.approx(task.share, abs=0.04)
    assert float((tokens == task.a + 1).float().mean()) == pytest.approx(task.reset, abs=0.04)


@each_task
def test_odds_sum_to_one(task: Counting) -> None:
    for n in range(task.length):
        assert sum(task.ages(n)) == pytest.approx(1)
        assert len(task.ages(n)) == n + 2
        assert sum(task.counts(n)) == pytest.approx(1)
        assert len(task.counts(n)) == task.most + 1


@each_task
def test_chance_and_baseline(task: Counting) -> None:
    usual = task.batch(20000, seeded(99))[1].mode(0).values

    def likeliest_since(tokens: Tensor, _: Tensor) -> Tensor:
        at = torch.arange(task.length)
        resets = torch.where(tokens == task.a + 1, at, -1).cummax(1).values
        best = torch.tensor([task.counts(n).index(max(task.counts(n))) for n in range(task.length + 1)])
        return best[at - resets]

    assert agrees(task.chance, task, lambda x, y: usual.expand_as(y))
    assert agrees(task.baseline, task, lambda x, y: likeliest_since(x, y).where(x != task.a + 1, 0))


def test_same_seed_same_batch() -> None:
    assert repeatable(Counting())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"length": 0}, "at least 1"),
        ({"most": 0}, "greatest count"),
        ({"fillers": 0}, "fillers of at least 1"),
        ({"share": 0}, "got share 0"),
        ({"share": 0.7, "reset": 0.4}, "at most 1 together"),
        ({"reset": -0.1}, "reset -0.1"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Counting(**wrong)
