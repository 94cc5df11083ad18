"""The sum of two marked numbers."""

from __future__ import annotations

import pytest

from saccade.tasks.adding import Adding
from tasks.helpers import repeatable, seeded


@pytest.mark.parametrize("length", [2, 7, 128])
def test_a_number_of_each_half_is_marked_and_their_sum_asked(length: int) -> None:
    series, sums = Adding(length).batch(500, seeded())
    assert series.shape == (500, length, 2)
    seen = set()
    for row, total in zip(series.tolist(), sums.tolist(), strict=True):
        first, second = (at for at, (_, mark) in enumerate(row) if mark == 1)
        assert first < length // 2 <= second
        assert total == pytest.approx(row[first][0] + row[second][0], abs=1e-6)
        assert all(0 <= number < 1 and mark in (0, 1) for number, mark in row)
        seen |= {first, second}
    assert seen >= {0, length - 1} if length < 10 else len(seen) > 100


def test_chance_and_baseline() -> None:
    task = Adding()
    series, sums = task.batch(20000, seeded())
    assert float((sums - 1).square().mean()) == pytest.approx(task.chance, rel=0.03)
    second = (series[:, 64:, 0] * series[:, 64:, 1]).sum(1)
    assert float((sums - 0.5 - second).square().mean()) == pytest.approx(task.baseline, rel=0.03)


def test_same_seed_same_batch() -> None:
    assert repeatable(Adding())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="length is at least 2, got 1"):
        Adding(1)
