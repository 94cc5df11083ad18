"""Passkey: the key stands after the mark, anywhere in the filler, and is asked for at the end."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from saccade.tasks.passkey import Passkey
from saccade.tasks.recall import SILENT
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Passkey(),
    Passkey(length=5, digits=2, phrase=1),
    Passkey(length=200, digits=6),
    Passkey(9, digits=1),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def read(task: Passkey, row: list[int]) -> list[int]:
    at = row.index(task.mark) + 1
    return row[at : at + task.digits]


def test_small_example() -> None:
    """Two digits in a phrase of three words: mark 10, ask 11, words 12 to 14."""
    tokens, targets = Passkey(length=8, digits=2, phrase=3).batch(5000, seeded())
    row = tokens.tolist().index([13, 14, 10, 4, 7, 12, 11, 4])
    assert targets[row].tolist() == [SILENT] * 6 + [4, 7]


@each_task
def test_plain_code_answers_all(task: Passkey) -> None:
    tokens, targets = task.batch(300, seeded())
    silent = [SILENT] * (task.length - task.digits)
    assert torch.equal(by_row(lambda x, _: silent + read(task, x))(tokens, targets), targets)
    for row in tokens.tolist():
        assert row.count(task.mark) == row.count(task.ask) == 1
        assert row[-task.digits] == task.ask
        assert row[task.length - task.digits + 1 :] == read(task, row)[:-1]
        words = [(at, token - 12) for at, token in enumerate(row) if token >= 12]
        assert len({(word - at) % task.phrase for at, word in words}) <= 1
    assert tokens.max() < task.vocab


def test_depth_places_the_key() -> None:
    task = Passkey(length=64)
    places = {depth: task.batch(20, seeded(), depth)[0] == task.mark for depth in (0.0, 0.5, 1.0, None)}
    where = {depth: set(mark.nonzero()[:, 1].tolist()) for depth, mark in places.items()}
    assert where[0.0] == {0}
    assert where[0.5] == {28}
    assert where[1.0] == {64 - 4 - 5}
    assert len(where[None]) > 10
    everywhere = (task.batch(3000, seeded())[0] == task.mark).nonzero()[:, 1]
    assert set(everywhere.tolist()) == set(range(56))


@each_task
def test_chance_and_baseline(task: Passkey) -> None:
    def most_left(row: list[int], _: list[int]) -> list[int]:
        key, found = read(task, row), []
        for at in range(task.digits):
            left = Counter(key[at:])
            found.append(max(sorted(left), key=lambda digit: left[digit]))
        return [SILENT] * (task.length - task.digits) + found

    assert agrees(task.chance, task, lambda x, y: torch.full_like(y, 7))
    assert agrees(task.baseline, task, by_row(most_left))
    assert accuracy(task, by_row(most_left)) > task.chance


def test_same_seed_same_batch() -> None:
    assert repeatable(Passkey())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"digits": 0}, "at least one digit"),
        ({"phrase": 0}, "one filler word"),
        ({"length": 8}, "4 digits needs at least 9 tokens, got 8"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Passkey(**wrong)
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        Passkey().batch(1, seeded(), depth=2)
