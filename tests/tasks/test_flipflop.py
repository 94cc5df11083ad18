"""Flip-flop: every read is answered by the bit that was written last."""

from __future__ import annotations

import pytest
import torch

from saccade.tasks.flipflop import IGNORE, READ, WRITE, FlipFlop
from saccade.tasks.recall import SILENT
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    FlipFlop(),
    FlipFlop(length=4, ignore=0.5),
    FlipFlop(length=10, ignore=0),
    FlipFlop(length=20, ignore=1),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def last_written(row: list[int], _: list[int]) -> list[int]:
    answers, bit = [], 0
    for at in range(0, len(row), 2):
        bit = row[at + 1] if row[at] == WRITE else bit
        answers += [bit if row[at] == READ else SILENT, SILENT]
    return answers


def test_small_example() -> None:
    tokens, targets = FlipFlop(length=8, ignore=0.4).batch(2000, seeded())
    row = tokens.tolist().index([WRITE, 1, IGNORE, 0, READ, 1, READ, 1])
    assert targets[row].tolist() == [SILENT, SILENT, SILENT, SILENT, 1, SILENT, 1, SILENT]


@each_task
def test_plain_code_answers_all(task: FlipFlop) -> None:
    tokens, targets = task.batch(300, seeded())
    assert torch.equal(by_row(last_written)(tokens, targets), targets)
    assert accuracy(task, by_row(last_written)) == 1
    reads = tokens[:, 0::2] == READ
    assert torch.equal(tokens[:, 1::2][reads], targets[:, 0::2][reads])
    assert (tokens[:, 0] == WRITE).all()
    assert (tokens[:, -2] == READ).all()


@pytest.mark.parametrize("ignore", [0.0, 0.5, 0.8, 0.98])
def test_instructions_have_their_shares(ignore: float) -> None:
    inner = FlipFlop(length=204, ignore=ignore).batch(400, seeded())[0][:, 2:-2:2]
    for instruction, share in [(IGNORE, ignore), (WRITE, (1 - ignore) / 2), (READ, (1 - ignore) / 2)]:
        assert float((inner == instruction).float().mean()) == pytest.approx(share, abs=0.01)


@each_task
def test_chance_and_baseline(task: FlipFlop) -> None:
    def last_bit(row: list[int], _: list[int]) -> list[int]:
        return [0, 0] + [bit for at in range(3, len(row), 2) for bit in (row[at - 2], 0)]

    assert agrees(task.chance, task, lambda x, y: torch.ones_like(y))
    assert agrees(task.baseline, task, by_row(last_bit), size=1000)
    assert task.chance <= task.baseline


def test_same_seed_same_batch() -> None:
    assert repeatable(FlipFlop())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"length": 2}, "at least 4"),
        ({"length": 9}, "even length.*got 9"),
        ({"ignore": 1.1}, "0 to 1, got 1.1"),
        ({"ignore": -0.1}, "0 to 1"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlipFlop(**wrong)
