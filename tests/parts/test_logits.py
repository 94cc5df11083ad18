"""Terms on logits against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc
from parts import tools
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


@pytest.mark.parametrize("text", ["softcap(1.5)", "temperature(0.3)"])
def test_softcap_and_temperature(text: str) -> None:
    q, k = torch.randn(2, 1, 2, 6, 3, dtype=torch.float64)
    m = sc.mechanism(text)
    assert isinstance(m, sc.Pairwise)
    got = tools.logits(m, q, k)
    for h in range(2):
        for i in range(6):
            for j in range(6):
                s = float(q[0, h, i] @ k[0, h, j]) / math.sqrt(3)
                want = 1.5 * math.tanh(s / 1.5) if text.startswith("softcap") else s / 0.3
                assert got[0, h, i, j].item() == pytest.approx(want, abs=1e-12)


def test_the_order_of_terms_counts() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 3)
    a, b = (sc.attend(q, k, v, t) for t in ("softcap(1.0) + alibi", "alibi + softcap(1.0)"))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("pairs", ["full", "causal", "window(3)", "causal + top_blocks(2, top=1) + chunk(2)"])
@pytest.mark.parametrize("ragged", [False, True])
def test_length_scale_grows_with_the_keys_of_a_row(pairs: str, ragged: bool) -> None:
    q, k = torch.randn(2, 1, 2, 8, 3, dtype=torch.float64)
    gain = torch.tensor([0.7, 1.9], dtype=torch.float64)
    m = sc.mechanism(f"{pairs} + length_scale(16)")
    assert isinstance(m, sc.Pairwise)
    ends = torch.tensor([6]) if ragged else None
    got = tools.logits(m, q, k, params={"length_scale": gain}, ends=ends)
    for h in range(2):
        for i in range(8):
            keys = [j for j in range(8) if got[0, h, i, j] > -math.inf]
            for j in keys:
                s = float(q[0, h, i] @ k[0, h, j]) / math.sqrt(3)
                want = s * float(gain[h]) * math.log(len(keys)) / math.log(16)
                assert got[0, h, i, j].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("pairs", ["full", "causal", "chunk(3)"])
@pytest.mark.parametrize("ragged", [False, True])
def test_per_key_divides_by_the_keys_of_a_row(pairs: str, ragged: bool) -> None:
    q, k = torch.randn(2, 1, 2, 8, 3, dtype=torch.float64)
    m = sc.mechanism(f"{pairs} + per_key")
    assert isinstance(m, sc.Pairwise)
    got = tools.logits(m, q, k, ends=torch.tensor([6]) if ragged else None)
    for h in range(2):
        for i in range(8):
            keys = [j for j in range(8) if got[0, h, i, j] > -math.inf]
            for j in keys:
                want = float(q[0, h, i] @ k[0, h, j]) / math.sqrt(3) / len(keys)
                assert got[0, h, i, j].item() == pytest.approx(want, abs=1e-12)


def test_rows_of_the_named_length_start_as_plain_ones() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 4)
    gain = {"length_scale": torch.ones(2)}
    plain = sc.attend(q, k, v, "causal")
    scaled = sc.attend(q, k, v, "causal + length_scale(16)", params=gain)
    torch.testing.assert_close(scaled[:, :, -1], plain[:, :, -1])
    assert (scaled - plain)[:, :, 1:-1].abs().max() > 1e-3


def test_a_length_scaled_maximum_does_not_flatten_out() -> None:
    """One logit of 1 among n of 0: its softmax weight vanishes as n grows, the length-scaled one of gain log 16 is n / (2 n - 1)."""
    q = torch.ones(1, 1, 1, 1)
    gain = {"length_scale": torch.full((1,), math.log(16))}
    for n in (16, 256, 4096):
        k = torch.zeros(1, 1, n, 1)
        k[..., 3, 0] = 1
        plain, scaled = (
            float(sc.attend(q, k, k, t, params=p)) for t, p in (("full", {}), ("length_scale(16)", gain))
        )
        assert plain == pytest.approx(math.e / (math.e + n - 1), rel=1e-4)
        assert scaled == pytest.approx(n / (2 * n - 1), rel=1e-4)
