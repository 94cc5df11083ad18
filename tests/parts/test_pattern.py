"""Patterns by document, prefix, block, head and shuffled order against plain formulas, and what they claim."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade as sc
from parts.test_mask import N, claims_hold, table
from saccade.errors import MechanismError
from saccade.parts.algebra import Mask, static_exist
from saccade.parts.pattern import (
    Document,
    Every,
    HeadStride,
    HeadStripes,
    LocalBlocks,
    Permuted,
    PowerBlocks,
    Prefix,
    Stripes,
    shuffled,
)

Rule = Callable[[int, int], bool]


def rule(mask: Mask) -> Rule:
    """The mask's definition in words of one pair (i, j)."""
    match mask:
        case Document(lengths=lengths):
            owner = [n for n, length in enumerate(lengths) for _ in range(length)] + [len(lengths)] * N
            return lambda i, j: owner[i] == owner[j]
        case Prefix(tokens=n):
            return lambda i, j: (i < n and j < n) or j <= i
        case Every(step=s, first=f):
            return lambda i, j: j in range(f, N, s)
        case LocalBlocks(block=b, last=n):
            return lambda i, j: j // b in range(i // b - n + 1, i // b + 1)
        case PowerBlocks(block=b):
            return lambda i, j: i // b - j // b in [1, 2, 4, 8, 16, 32, 64]
        case Stripes(block=b, every=s, shift=h):
            return lambda i, j: (j // b + h) % s == 0
        case Permuted(width=w):
            place = mask.place(torch.arange(N)).tolist()
            return lambda i, j: abs(place[i] - place[j]) <= (w - 1) / 2
    raise AssertionError(f"no rule for {mask}")


MASKS: list[Mask] = [
    Document((1,)),
    Document((7, 1, 20)),
    Document((50, 3)),
    Prefix(1),
    Prefix(9),
    Prefix(60),
    Every(1),
    Every(5, first=3),
    Every(7, first=50),
    LocalBlocks(1),
    LocalBlocks(6, last=3),
    LocalBlocks(50, last=2),
    PowerBlocks(1),
    PowerBlocks(5),
    Stripes(1, every=3),
    Stripes(6, every=4, shift=3),
    Stripes(50, every=2, shift=1),
    Permuted(1, length=16),
    Permuted(7, length=16),
    Permuted(9, length=400, seed=5),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_existence_is_the_formula(mask: Mask) -> None:
    holds, found = rule(mask), table(mask)
    for i in range(N):
        for j in range(N):
            assert bool(found[i, j]) == holds(i, j), (i, j)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_claims(mask: Mask) -> None:
    claims_hold(mask)


def test_blocks_are_covered_tightly() -> None:
    assert PowerBlocks(4).spans(40, 44, 100) == [(8, 12), (24, 28), (32, 40)]
    assert Stripes(4, every=3, shift=1).spans(0, 1, 40) == [(8, 12), (20, 24), (32, 36)]
    assert LocalBlocks(4, last=2).spans(9, 13, 100) == [(4, 16)]
    assert Document((10, 20)).spans(12, 15, 100) == [(10, 30)]
    assert Document((10, 20)).spans(5, 15, 100) == [(0, 30)]
    assert Document((10, 20)).spans(31, 35, 100) == [(30, 100)]


def test_documents_do_not_see_each_other_also_when_padded() -> None:
    q, k, v = torch.randn(3, 2, 2, 30, 8, dtype=torch.float64)
    for text in ("document((12, 11))", "causal + document((12, 11))"):
        inner = "causal" if "causal" in text else "full"
        packed = sc.attend(q, k, v, text)
        for a, b in ((0, 12), (12, 23), (23, 30)):
            alone = sc.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], inner)
            torch.testing.assert_close(packed[:, :, a:b], alone)
        poisoned = [x.clone() for x in (q, k, v)]
        for x in poisoned:
            x[1, :, 20:] = math.nan
        padded = sc.attend(*poisoned, text, key_lengths=torch.tensor([30, 20]))
        torch.testing.assert_close(padded[0], packed[0])
        last = sc.attend(q[1:, :, 12:20], k[1:, :, 12:20], v[1:, :, 12:20], inner)
        torch.testing.assert_close(padded[1:, :, 12:20], last)


def test_limits_and_allowances() -> None:
    assert str(sc.mechanism("document((4, 5)) + causal + window(3) + sink").pairs) == (
        "document((4, 5)) & causal & (window(3) | sink)"
    )
    assert str(sc.mechanism("prefix(8) + neighborhood(5)").pairs) == "prefix(8) & neighborhood(5)"
    assert str(sc.mechanism("causal + local_blocks(4) + power_blocks(4)").pairs) == (
        "causal & (local_blocks(4) | power_blocks(4))"
    )


def test_a_prefix_of_everything_is_full_and_of_one_token_is_causal() -> None:
    assert table(Prefix(N)).all()
    assert torch.equal(table(Prefix(1)), torch.ones(N, N, dtype=torch.bool).tril())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1 << 40), st.integers(0, 1000))
def test_shuffling_is_a_permutation_with_a_key(length: int, seed: int, run: int) -> None:
    x = torch.arange(length)
    found = shuffled(x, torch.full_like(x, run), length, seed)
    assert sorted(found.tolist()) == list(range(length))
    assert torch.equal(found, shuffled(x, torch.full_like(x, run), length, seed))


def test_shuffles_differ_by_seed_and_look_random() -> None:
    x = torch.arange(1000)
    a, b = (Permuted(1, 1000, seed).place(x).double() for seed in (0, 1))
    assert (a == b).double().mean() < 0.02
    for p in (a, b):
        both = torch.stack((p, x.double()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1
        assert abs(float(torch.corrcoef(torch.stack((p[1:], p[:-1])))[0, 1])) < 0.1
        spread = torch.histc((p[1:] - p[:-1]).abs(), 4, 0, 1000) / 999
        torch.testing.assert_close(
            spread, torch.tensor([7, 5, 3, 1], dtype=torch.float64) / 16, atol=0.06, rtol=0
        )


def test_heads_take_turns() -> None:
    assert [HeadStride(3).at(h, 6) for h in range(6)] == [Every(3, h % 3) for h in range(6)]
    assert [HeadStripes(8, 4, step=2, share=2).at(h, 8).shift for h in range(8)] == [0, 0, 2, 2, 0, 0, 2, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("document((4, 0))", "each of lengths must be a whole number of at least 1, got 0"),
        ("document(4)", r"lengths must be numbers in brackets, as in \(4, 8\), got 4"),
        ("prefix(0)", "tokens must be a whole number of at least 1"),
        ("every(0)", "step must be"),
        ("permuted(4)", "width must be odd.*use 3 or 5"),
        ("power_blocks(0)", "block must be"),
        ("head_stripes(every=0)", "every must be"),
    ],
)
def test_bad_arguments(text: str, why: str) -> None:
    with pytest.raises(MechanismError, match=why):
        sc.mechanism(text)


def test_more_strides_than_heads_are_refused() -> None:
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(
        MechanismError, match="2 heads leave keys that none reads at a step of 3; take at most 2"
    ):
        sc.attend(q, q, q, "head_stride(3)")


@pytest.mark.parametrize(
    "options", [{}, {"key_lengths": torch.tensor([40, 9])}, {"mask": torch.rand(2, 1, 7, 40) > 0.4}]
)
@pytest.mark.parametrize("first", [0, 2, 10])
def test_every_nth_key_is_a_view(first: int, options: dict[str, torch.Tensor]) -> None:
    q, k, v = (
        torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True)
        for h, n in ((4, 7), (2, 40), (2, 40))
    )
    text = f"every(3, first={first})"
    thin, chunk = (sc.attend(q, k, v, text, kernel=n, **options) for n in ("thin", "chunk"))
    torch.testing.assert_close(thin, chunk)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (thin, chunk)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert sc.plan(text, sc.Shape(2, 4, 7, 8, 2, 40)).kernel == "thin"


def test_a_first_key_beyond_all_keys_reads_nothing() -> None:
    q = torch.randn(1, 1, 5, 8)
    assert (sc.attend(q, q, q, "every(3, first=9)") == 0).all()


def test_exist_is_elementwise_on_any_shape() -> None:
    for mask in MASKS:
        i, j = torch.randint(N, (2, 3, 4)), torch.randint(N, (2, 3, 4))
        found = static_exist(mask, i, j).expand(2, 3, 4)
        assert torch.equal(found, table(mask)[i, j])
