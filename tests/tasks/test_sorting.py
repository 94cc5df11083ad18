"""Sorting: numbers by pointing, symbols by writing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.tasks.metric import exact_match
from saccade.tasks.sorting import Sorting, SymbolSorting
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded


def exact(task: Sorting, answer: list[int] | None, size: int = 4000) -> tuple[float, float]:
    """Exact match of one fixed answer, or of sorting by the first decimal, and its standard error."""
    numbers, targets = task.batch(size, seeded())
    coarse = (numbers * 10).floor().argsort(dim=1, stable=True)
    share = exact_match(coarse if answer is None else torch.tensor(answer).expand_as(targets), targets)
    return share, math.sqrt(share * (1 - share) / size)


def test_small_example() -> None:
    numbers, targets = Sorting(3, 3).batch(200, seeded())
    for (a, b, c), order in zip(numbers.tolist(), targets.tolist(), strict=True):
        assert (order == [2, 0, 1]) == (c < a < b)


def test_plain_code_answers_all() -> None:
    task = Sorting(1, 9)
    seen = set()
    for seed in range(60):
        numbers, targets = task.batch(5, seeded(seed))
        seen.add(numbers.shape[1])
        for row, order in zip(numbers.tolist(), targets.tolist(), strict=True):
            assert order == sorted(range(len(row)), key=lambda i: row[i])
            assert min(row) >= 0
            assert max(row) < 1
    assert seen == set(range(1, 10))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_chance_and_baseline(count: int) -> None:
    task = Sorting(count, count)
    assert task.chance == 1 / math.factorial(count)
    share, error = exact(task, list(range(count)))
    assert abs(share - task.chance) <= 4 * error
    share, error = exact(task, None)
    assert abs(share - task.baseline) <= 4 * error
    assert task.baseline >= task.chance


def test_two_numbers_share_a_decimal_once_in_ten() -> None:
    assert Sorting(2, 2).baseline == pytest.approx(0.9 + 0.1 / 2)
    assert Sorting(1, 2).chance == pytest.approx((1 + 1 / 2) / 2)
    assert Sorting(1, 2).baseline == pytest.approx((1 + 0.95) / 2)


SYMBOLS = [SymbolSorting(), SymbolSorting(length=5, symbols=3), SymbolSorting(length=12, symbols=4)]


def test_small_example_of_symbols() -> None:
    symbols, targets = SymbolSorting(length=4, symbols=3).batch(500, seeded())
    assert targets[symbols.tolist().index([2, 0, 1, 0])].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("task", SYMBOLS, ids=str)
def test_symbols_in_order(task: SymbolSorting) -> None:
    def by_counts(row: list[int], _: list[int]) -> list[int]:
        return [s for s in range(task.vocab) for _ in range(row.count(s))]

    assert accuracy(task, by_row(by_counts)) == 1


@pytest.mark.parametrize("task", SYMBOLS, ids=str)
def test_chance_and_baseline_of_symbols(task: SymbolSorting) -> None:
    def likeliest(_: Tensor, targets: Tensor) -> Tensor:
        many = task.batch(20000, seeded(99))[1]
        return many.mode(0).values.expand_as(targets)

    def next_shown(row: list[int], answer: list[int]) -> list[int]:
        return [min((s for s in row if s > last), default=last) for last in [-1, *answer[:-1]]]

    def once_more(row: list[int], answer: list[int]) -> list[int]:
        return [min(row), *answer[:-1]]

    assert agrees(task.chance, task, likeliest)
    both = [accuracy(task, by_row(strategy), 4000) for strategy in (next_shown, once_more)]
    assert agrees(task.baseline, task, by_row(next_shown if both[0] > both[1] else once_more))
    assert task.chance < task.baseline


def test_same_seed_same_batch() -> None:
    assert repeatable(Sorting(5, 5))
    assert repeatable(SymbolSorting())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sorting(0, 3), "1 <= shortest"),
        (lambda: Sorting(5, 4), "got 5 and 4"),
        (lambda: SymbolSorting(length=0), "got length 0"),
        (lambda: SymbolSorting(symbols=1), "1 symbols"),
    ],
)
def test_bad_arguments(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
