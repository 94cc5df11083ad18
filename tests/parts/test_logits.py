"""Terms on logits against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc
from saccade.parts.logits import Alibi, alibi_slopes


def test_slopes_of_eight_heads_are_halves() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_slopes_of_other_powers_of_two() -> None:
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(16) == pytest.approx([2 ** (-0.5 * n) for n in range(1, 17)])


def test_slopes_of_six_and_twelve_heads_fill_up_from_the_next_power() -> None:
    assert alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert alibi_slopes(3) == pytest.approx([2**-4, 2**-8, 2**-2])


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_falls_with_distance_on_both_sides(heads: int) -> None:
    got = Alibi().bias(torch.arange(6)[:, None], torch.arange(9)[None], heads, torch.float64)
    assert got.shape == (heads, 6, 9)
    for h in range(heads):
        slope = 2.0 ** -(h + 1) if h < 8 else 2.0 ** -(h - 8 + 0.5)
        for i in range(6):
            for j in range(9):
                assert got[h, i, j].item() == pytest.approx(-slope * abs(i - j), rel=1e-14)


def test_alibi_through_attention_by_loops() -> None:
    b, h, n, d = 1, 6, 5, 3
    q, k, v = torch.randn(3, b, h, n, d, dtype=torch.float64)
    got = sc.reference.attend(q, k, v, "alibi + causal")
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    for head in range(h):
        for i in range(n):
            s = [
                sum(q[0, head, i, c].item() * k[0, head, j, c].item() for c in range(d)) / math.sqrt(d)
                - slopes[head] * (i - j)
                for j in range(i + 1)
            ]
            total = sum(math.exp(x) for x in s)
            for c in range(d):
                want = sum(math.exp(x) / total * v[0, head, j, c].item() for j, x in enumerate(s))
                assert got[0, head, i, c].item() == pytest.approx(want, abs=1e-12)
