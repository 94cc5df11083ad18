"""Strings of a Markov chain behind a noise."""

from __future__ import annotations

import pytest
import torch

from saccade.tasks.noisy import NoisyText
from tasks.helpers import seeded


def test_each_symbol_is_followed_by_one_of_two() -> None:
    task = NoisyText(length=40, symbols=7, language=3)
    text, follows = task.strings(500, seeded()), task.followers()
    first = text[:, 1:] == follows[text[:, :-1], 0]
    assert bool((first | (text[:, 1:] == follows[text[:, :-1], 1])).all())
    assert abs(float(first.float().mean()) - 0.75) < 0.02
    assert bool((follows[:, 0] != follows[:, 1]).all())
    assert not torch.equal(follows, NoisyText(symbols=7, language=4).followers())


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_the_source_keeps_what_the_baseline_says(noise: float) -> None:
    task = NoisyText(noise=noise)
    source, text = task.pairs(2000, seeded(1))
    assert abs(float((source == text).float().mean()) - task.baseline) < 0.01
    assert int(source.max()) < task.symbols == task.start == task.vocab - 1


def test_a_decoder_reads_the_start_and_all_but_the_last_symbol() -> None:
    task = NoisyText(length=3, symbols=5)
    assert task.decoded(torch.tensor([[1, 2, 3]])).tolist() == [[5, 1, 2]]
    assert task.chance == 1 / 5


def test_the_same_seed_gives_the_same_pairs() -> None:
    one, two, other = (NoisyText().pairs(8, seeded(s)) for s in (3, 3, 4))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[1], other[1])


def test_bad_arguments() -> None:
    for bad in ({"length": 0}, {"symbols": 2}, {"noise": 1.5}):
        with pytest.raises(ValueError, match="a noisy text needs a length of at least 1"):
            NoisyText(**bad)
