"""Multi-query associative recall: what is asked was shown, nothing else answers it, chance is chance."""

from __future__ import annotations

import pytest
import torch

from saccade.tasks.recall import SILENT, Recall, accuracy


def draw(
    task: Recall, size: int = 64, seed: int = 0, pairs: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return task.batch(size, torch.Generator().manual_seed(seed), pairs)


@pytest.mark.parametrize(
    "task", [Recall(48), Recall(64), Recall(320, pairs=4, queries=7), Recall(20, 3, 5, 6, 9)]
)
def test_every_answer_is_the_value_shown_after_its_key(task: Recall) -> None:
    tokens, targets = draw(task)
    assert tokens.shape == targets.shape == (64, task.length)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[0 : 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
        assert len(shown) == len(set(shown.values())) == task.pairs
        asked = [(key, answer) for key, answer in zip(row, answers, strict=True) if answer != SILENT]
        assert len(asked) == task.queries
        assert all(shown[key] == answer for key, answer in asked)


def test_keys_values_and_filler_share_no_token() -> None:
    task = Recall(64)
    tokens, targets = draw(task)
    assert tokens[:, 0:16:2].max() < task.keys
    values = tokens[:, 1:16:2]
    assert values.min() >= task.keys
    assert values.max() < task.vocab - 1
    assert (tokens[:, 16:-32] == task.vocab - 1).all()
    assert (targets[:, :-32] == SILENT).all()


def test_a_window_of_that_many_keys_sees_no_answer() -> None:
    task = Recall(320)
    tokens, targets = draw(task)
    first_question = int((targets[0] != SILENT).nonzero()[0])
    last_value = int(((tokens[0] >= task.keys) & (tokens[0] < task.vocab - 1)).nonzero()[-1])
    assert first_question - last_value == task.beyond
    two_layers_of_window_128 = 2 * 127
    assert task.beyond > two_layers_of_window_128


def test_same_seed_same_batch_and_another_seed_another() -> None:
    task = Recall(64)
    assert torch.equal(draw(task)[0], draw(task)[0])
    assert not torch.equal(draw(task)[0], draw(task, seed=1)[0])


def test_fewer_pairs_may_be_shown() -> None:
    task = Recall(64)
    tokens, _ = draw(task, pairs=2)
    assert (tokens[:, 4:-32] == task.vocab - 1).all()
    assert (tokens[:, -32:] < task.keys).all()


def test_guessing_among_shown_values_scores_chance() -> None:
    task = Recall(64)
    tokens, targets = draw(task, size=400)
    guess = tokens[:, 1:2].expand(-1, task.length)
    logits = torch.nn.functional.one_hot(guess, task.vocab).float()
    assert accuracy(logits, targets) == pytest.approx(task.chance, abs=0.02)


def test_accuracy_counts_questions_alone() -> None:
    targets = torch.tensor([[SILENT, 2, 1]])
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 0] = logits[0, 1, 2] = logits[0, 2, 0] = 1.0
    assert accuracy(logits, targets) == 0.5


@pytest.mark.parametrize(
    "wrong",
    [{"length": 47}, {"length": 64, "pairs": 0}, {"length": 64, "pairs": 17}, {"length": 64, "queries": 0}],
)
def test_impossible_tasks_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="recall"):
        Recall(**wrong)
