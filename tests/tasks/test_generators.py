"""The small generators: what they draw, and that chance and baseline are what they say."""

from __future__ import annotations

import pytest
import torch

from saccade.tasks.metric import exact_match
from saccade.tasks.motifs import Motifs
from saccade.tasks.needle import Needle
from saccade.tasks.numerals import Numerals, words
from saccade.tasks.recall import SILENT
from saccade.tasks.waves import Waves


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exact_match_skips_silent_places() -> None:
    found = torch.tensor([[1, 2, 9], [1, 3, 9]])
    assert exact_match(found, torch.tensor([[1, 2, SILENT], [1, 2, SILENT]])) == 0.5


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "zero"),
        (17, "seventeen"),
        (20, "twenty"),
        (402, "four hundred two"),
        (17000, "seventeen thousand"),
        (999999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_number_words(number: int, text: str) -> None:
    assert " ".join(words(number)) == text


def test_numerals_hold_numbers_out() -> None:
    task = Numerals(digits=3)
    assert task.source_length == max(len(words(n)) for n in range(1000))
    seen = {int("".join(map(str, row))) for row in task.batch(5000, seeded())[2].tolist()}
    held = {int("".join(map(str, row))) for row in task.heldout(100)[2].tolist()}
    assert len(held) == 100
    assert not seen & held
    source, lengths, digits = task.encode([402, 7])
    assert lengths.tolist() == [3, 1]
    assert source.shape == (2, 3)
    assert digits.tolist() == [[4, 0, 2], [0, 0, 7]]
    assert task.shifted(digits).tolist() == [[10, 4, 0], [10, 0, 0]]
    assert 0.05 < task.baseline(100) < 0.9


def test_needle_answers_what_it_hid() -> None:
    task = Needle(length=40, needles=3, queries=5)
    tokens, targets = task.batch(100, seeded())
    facts = task.keys + task.values
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown = [t - facts for t in row if facts <= t < facts + task.keys * task.values]
        assert len(shown) == 3
        known = {fact // task.values: fact % task.values for fact in shown}
        assert len(known) == 3
        assert [known[key] + task.keys for key in row[-5:]] == wanted[-5:]
        assert set(wanted[:-5]) == {SILENT}


def test_motifs_tell_families_apart_by_order_alone() -> None:
    task = Motifs()
    tokens, family = task.batch(500, seeded())
    assert task.baseline(tokens, family) > 0.95
    counts = torch.nn.functional.one_hot(tokens, task.symbols).sum(1).double()
    spread = torch.stack([counts[family == f].mean(0) for f in range(task.families)]).std(0)
    assert spread.max() < 0.6


def test_waves_have_the_variance_and_baseline_that_they_state() -> None:
    task = Waves()
    series = task.batch(5000, seeded())
    assert series.shape == (5000, task.length)
    assert abs(float(series.square().mean()) / task.chance - 1) < 0.05
    assert task.floor < task.baseline(series, 1) < task.baseline(series, 8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Numerals(digits=9), "1 to 6"),
        (lambda: Needle(length=4), "at least"),
        (lambda: Needle(length=40, needles=9), "1 to 8"),
        (lambda: Motifs(width=13), "width"),
        (lambda: Motifs(length=10), "do not fit"),
        (lambda: Waves(shortest=1.0), "periods above 2"),
    ],
)
def test_impossible_tasks_are_refused(make: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()  # type: ignore[operator]
