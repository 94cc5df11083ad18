"""Odds of simple strategies, against counting all cases."""

from __future__ import annotations

from itertools import product

import pytest

from saccade.tasks.odds import binomial, order_blind, top_share


@pytest.mark.parametrize(("count", "symbols"), [(1, 2), (2, 3), (5, 2), (4, 4), (6, 3)])
def test_top_share_counts_all_strings(count: int, symbols: int) -> None:
    strings = list(product(range(symbols), repeat=count))
    shares = [max(string.count(s) for s in range(symbols)) / count for string in strings]
    assert top_share(count, symbols) == pytest.approx(sum(shares) / len(strings), abs=1e-12)


def test_top_share_at_the_ends() -> None:
    assert top_share(3, 1) == pytest.approx(1)
    assert top_share(500, 10) == pytest.approx(0.1, abs=0.04)
    assert top_share(500, 10) > 0.12


def test_order_blind_is_the_mean_over_what_is_left() -> None:
    assert order_blind(1, 5) == pytest.approx(1)
    assert order_blind(2, 4) == pytest.approx((1 + (1 / 4 + 3 / 4 / 2)) / 2)


def test_binomial_counts_all_cases() -> None:
    assert binomial(2, 0.25) == pytest.approx([9 / 16, 6 / 16, 1 / 16])
    assert binomial(0, 0.3) == pytest.approx([1.0])
    assert binomial(2, 0.0) == [1.0, 0.0, 0.0]
    assert binomial(2, 1.0) == [0.0, 0.0, 1.0]
    assert sum(binomial(3000, 0.4)) == pytest.approx(1)
    assert sum(binomial(40, 0.7)) == pytest.approx(1)
