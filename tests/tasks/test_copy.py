"""Copy: the answer is the string, backwards or repeated as asked; a small Transformer learns it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.copy import Copy
from saccade.tasks.metric import exact_match
from saccade.tasks.recall import SILENT
from saccade.tasks.recall import accuracy as score
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [
    Copy(),
    Copy(length=6, symbols=4, reverse=True),
    Copy(length=7, symbols=5, shortest=2),
    Copy(length=5, symbols=4, shortest=1, reverse=True, repeats=(1, 3, 2)),
]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def written(task: Copy, string: list[int]) -> list[int]:
    order = string[::-1] if task.reverse else string
    return [s for s in order for _ in range(task.repeats[s % len(task.repeats)])] + [task.end]


def test_small_example() -> None:
    task = Copy(length=3, symbols=2, reverse=True, repeats=(1, 2))
    tokens, targets = task.batch(100, seeded())
    row = tokens[:, :3].tolist().index([0, 1, 1])
    no = SILENT
    assert tokens[row].tolist() == [0, 1, 1, 2, 1, 1, 1, 1, 0, 2]
    assert targets[row].tolist() == [no, no, no, 1, 1, 1, 1, 0, 2, no]


@each_task
def test_plain_code_answers_all(task: Copy) -> None:
    def solve(row: list[int], _: list[int]) -> list[int]:
        string = row[: row.index(task.end)]
        answer = [SILENT] * len(string) + written(task, string)
        return answer + [SILENT] * (task.width - len(answer))

    tokens, targets = task.batch(300, seeded())
    assert torch.equal(by_row(solve)(tokens, targets), targets)
    assert accuracy(task, by_row(solve)) == 1
    assert {row.index(task.end) for row in tokens.tolist()} == set(task.lengths)


@each_task
def test_each_place_is_fed_the_answer_before_it(task: Copy) -> None:
    tokens, targets = task.batch(100, seeded())
    asked = (targets[:, 1:] != SILENT) & (targets[:, :-1] != SILENT)
    assert torch.equal(tokens[:, 1:][asked], targets[:, :-1][asked])


@each_task
def test_pairs_are_the_same_task_for_two_stacks(task: Copy) -> None:
    source, lengths, answer = task.pairs(100, seeded())
    assert answer.shape == (100, task.width - task.length)
    for row, n, said in zip(source.tolist(), lengths.tolist(), answer.tolist(), strict=True):
        whole = written(task, row[:n])
        assert row[n:] == [task.end] * (task.length - n)
        assert said == whole + [SILENT] * (answer.shape[1] - len(whole))
    shifted = task.shifted(answer)
    assert (shifted[:, 0] == task.end).all()
    follows = answer[:, 1:] != SILENT
    assert torch.equal(shifted[:, 1:][follows], answer[:, :-1][follows])
    assert shifted.min() >= 0


@each_task
def test_chance_and_baseline(task: Copy) -> None:
    def walk(answer: list[int], choose: Callable[[Counter], int]) -> list[int]:
        """What is answered by someone who knows repeats and the end, and chooses each new symbol from what is left."""
        found, firsts = list(answer), []
        place = next(at for at, token in enumerate(answer) if token != SILENT)
        while answer[place] != task.end:
            firsts.append(place)
            place += task.repeats[answer[place] % len(task.repeats)]
        left = Counter(answer[at] for at in firsts)
        for at in firsts:
            found[at] = choose(left)
            left[answer[at]] -= 1
        return found

    def most(left: Counter) -> int:
        return max(sorted(left), key=lambda symbol: left[symbol])

    assert agrees(task.chance, task, by_row(lambda _, y: walk(y, lambda left: 0)), size=200)
    assert agrees(task.baseline, task, by_row(lambda _, y: walk(y, most)), size=200)
    assert task.chance < task.baseline < 1


def test_same_seed_same_batch() -> None:
    assert repeatable(Copy())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"symbols": 1}, "at least 2 symbols"),
        ({"length": 0}, "length 0"),
        ({"length": 4, "shortest": 5}, "1 <= shortest <= length"),
        ({"shortest": 0}, "shortest 0"),
        ({"repeats": ()}, "at least once"),
        ({"repeats": (1, 0)}, r"got repeats \(1, 0\)"),
    ],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Copy(**wrong)


def test_a_small_transformer_learns_it() -> None:
    task, generator = Copy(length=6, symbols=8), seeded()
    model = sc.nn.Transformer(task.vocab, dim=48, depth=2, heads=4, mechanism="causal", max_length=task.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps = 300
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)

    def loss() -> Tensor:
        tokens, targets = task.batch(64, generator)
        return F.cross_entropy(model(tokens).transpose(1, 2), targets, ignore_index=SILENT)

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    tokens, targets = task.batch(500, seeded(1))
    with torch.no_grad():
        logits = model(tokens)
    assert score(logits, targets) > 0.98
    assert exact_match(logits.argmax(-1), targets) > 0.9
