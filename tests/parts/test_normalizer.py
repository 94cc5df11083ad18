"""Softmax against plain loops, and the algebra of (out, lse)."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade as sc
from saccade.parts.normalizer import Partial, Softmax, merge


def partial(s: Tensor, v: Tensor) -> Partial:
    w, lse = Softmax().normalize(s)
    return w @ v, lse


def test_softmax() -> None:
    s = 4 * torch.randn(2, 3, 5, dtype=torch.float64)
    s[0, 1, 2:] = -math.inf
    w, lse = Softmax().normalize(s)
    for a in range(2):
        for b in range(3):
            total = sum(math.exp(x) for x in s[a, b].tolist())
            assert lse[a, b].item() == pytest.approx(math.log(total), abs=1e-12)
            for c in range(5):
                assert w[a, b, c].item() == pytest.approx(math.exp(s[a, b, c].item()) / total, abs=1e-12)


def test_a_row_without_keys_gives_zeros_and_minus_infinity_and_finite_gradients() -> None:
    s = torch.full((2, 4), -math.inf, dtype=torch.float64)
    s[1, 2] = 3.0
    s.requires_grad_()
    w, lse = Softmax().normalize(s)
    assert w[0].tolist() == [0, 0, 0, 0]
    assert w[1].tolist() == [0, 0, 1, 0]
    assert lse.tolist() == [-math.inf, 3.0]
    (grad,) = torch.autograd.grad(w.sum() + lse[1], s)
    assert torch.isfinite(grad).all()


def test_logits_of_any_size() -> None:
    s = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e30, -1e30, -1e30]], dtype=torch.float64)
    w, lse = Softmax().normalize(s)
    assert w[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)), 0])
    assert w[1].tolist() == pytest.approx([1 / 3] * 3)
    assert lse[0].item() == pytest.approx(1e4 + math.log(1 + math.exp(-1)))


def cuts(keys: int, at: list[int]) -> list[slice]:
    edges = [0, *sorted(at), keys]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def nested(parts: list[Partial], rng: random.Random) -> Partial:
    """The parts merged in a random order and a random grouping."""
    parts = parts[:]
    rng.shuffle(parts)
    while len(parts) > 1:
        n = rng.randint(2, len(parts))
        parts = [merge(parts[:n]), *parts[n:]]
        rng.shuffle(parts)
    return merge(parts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 2**30))
def test_any_order_and_any_grouping_of_any_split_gives_the_whole(at: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    s = 10 * torch.randn(2, 3, 20, generator=g, dtype=torch.float64)
    s[0, 0] = -math.inf
    s[0, 1, :13] = -math.inf
    v = torch.randn(2, 20, 4, generator=g, dtype=torch.float64)
    out, lse = nested([partial(s[..., c], v[:, c]) for c in cuts(20, at)], random.Random(seed))
    want, want_lse = partial(s, v)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_empty_parts_do_not_count_whatever_they_hold() -> None:
    s, v = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 8, 4, dtype=torch.float64)
    whole = partial(s, v)
    void = (torch.full_like(whole[0], 1e30), torch.full_like(whole[1], -math.inf))
    for order in ([whole, void], [void, whole], [void, whole, void]):
        out, lse = merge(order)
        torch.testing.assert_close(out, whole[0])
        torch.testing.assert_close(lse, whole[1])


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_but_empty_parts_is_an_empty_row(count: int) -> None:
    out, lse = merge([(torch.full((1, 2, 3), 7.0), torch.full((1, 2), -math.inf))] * count)
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 64])
def test_statistics_are_float32_whatever_the_parts(dtype: torch.dtype, count: int) -> None:
    out, lse = merge([(torch.ones(1, 2, dtype=dtype), torch.zeros(1, dtype=dtype))] * count)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert lse.item() == pytest.approx(math.log(count), abs=1e-6)
    torch.testing.assert_close(out, torch.ones(1, 2, dtype=dtype), rtol=0, atol=torch.finfo(dtype).eps)


def test_sums_of_many_low_precision_parts_do_not_stall() -> None:
    parts = [
        (torch.full((1, 1), 1.0 if n else 200.0, dtype=torch.bfloat16), torch.zeros(1)) for n in range(400)
    ]
    out, _ = merge(parts)
    assert out.item() == pytest.approx((200 + 399) / 400, rel=1e-2)


def test_gradients_pass_through() -> None:
    s = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True)

    def halves(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return merge([partial(s[..., :3], v[:, :3]), partial(s[..., 3:], v[:, 3:])])

    for x, y in zip(
        torch.autograd.grad([y.sin().sum() for y in halves(s, v)], [s, v]),
        torch.autograd.grad([y.sin().sum() for y in partial(s, v)], [s, v]),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    part = (torch.ones(1, 2, 3), torch.zeros(1, 2))
    for other in ((torch.ones(1, 2, 4), torch.zeros(1, 2)), (torch.ones(1, 2, 3), torch.zeros(1, 3))):
        with pytest.raises(ValueError, match=r"shapes \(1, 2, 3\) and \(1, 2\); got"):
            merge([part, other])


def test_split_keys_through_the_public_call() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    whole = sc.attend(q, k, v, "full", need=("out", "lse"))
    found = [sc.attend(q, k[:, :, c], v[:, :, c], "full", need=("out", "lse")) for c in cuts(9, [0, 4, 7])]
    out, lse = sc.merge([(f.out, f.lse) for f in found])
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)
