"""Sentence pairs: the same words, or one exchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.tasks.pairs import SentencePairs
from tasks.helpers import accuracy, agrees, by_row, repeatable, seeded

TASKS = [SentencePairs(), SentencePairs(words=1, symbols=2), SentencePairs(words=3, symbols=4)]

each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def test_small_example() -> None:
    tokens, targets = SentencePairs(words=2, symbols=3).batch(500, seeded())
    assert targets[tokens.tolist().index([0, 2, 3, 2, 0])] == 1
    assert targets[tokens.tolist().index([0, 2, 3, 2, 1])] == 0
    assert targets[tokens.tolist().index([0, 2, 3, 1, 0])] == 0


@each_task
def test_plain_code_answers_all(task: SentencePairs) -> None:
    def same(row: list[int], _: int) -> int:
        return int(sorted(row[: task.words]) == sorted(row[task.words + 1 :]))

    assert accuracy(task, by_row(same)) == 1
    tokens, targets = task.batch(1000, seeded())
    assert (tokens[:, task.words] == task.vocab - 1).all()
    first, second = task.sentences(tokens)
    for a, b, answer in zip(first.tolist(), second.tolist(), targets.tolist(), strict=True):
        assert len(set(a)) == len(set(b)) == task.words
        assert len(set(a) & set(b)) == task.words - 1 + answer
    assert float(targets.float().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("answer", [0, 1])
def test_every_place_of_the_second_sentence_is_alike(answer: int) -> None:
    """Which word of the first sentence stands at a place, and where the new one stands, is even."""
    task = SentencePairs(words=3, symbols=9)
    tokens, targets = task.batch(8000, seeded())
    first, second = (half[targets == answer] for half in task.sentences(tokens))
    share = (first[:, :, None] == second[:, None]).float().mean(0)
    expected = 1 / 3 if answer else 2 / 9
    assert torch.allclose(share, torch.full((3, 3), expected), atol=0.03)


@each_task
def test_chance_and_baseline(task: SentencePairs) -> None:
    def first_word(tokens: Tensor, _: Tensor) -> Tensor:
        first, second = task.sentences(tokens)
        return (first == second[:, :1]).any(1).long()

    def first_word_back(tokens: Tensor, _: Tensor) -> Tensor:
        first, second = task.sentences(tokens)
        return (second == first[:, :1]).any(1).long()

    assert agrees(task.chance, task, lambda x, y: torch.ones_like(y), size=1000)
    assert agrees(task.baseline, task, first_word_back, size=1000)
    assert agrees(task.baseline, task, first_word, size=1000)


def test_same_seed_same_batch() -> None:
    assert repeatable(SentencePairs())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"words": 0}, "got 0 words"), ({"words": 6, "symbols": 6}, "more symbols than words")],
)
def test_bad_arguments(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SentencePairs(**wrong)
