"""Entmax against a scalar search, against sorting, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.entmax import Entmax
from systems.helpers import largest_temporary, qkv

ALPHAS = [1.0, 1.05, 1.25, 1.5, 1.9, 2.0, 2.5, 4.0]


def weights(s: Tensor, alpha: float) -> Tensor:
    return Entmax(alpha).normalize(s)[0]


def scalar(row: list[float], alpha: float) -> list[float]:
    """One row by bisection of its threshold in plain Python, from the definition."""
    if alpha == 1:
        total = sum(math.exp(x - max(row)) for x in row)
        return [math.exp(x - max(row)) / total for x in row]
    x, p = [(alpha - 1) * s for s in row], 1 / (alpha - 1)
    low, high = max(x) - 1, max(x)
    for _ in range(200):
        tau = (low + high) / 2
        if sum(max(0.0, a - tau) ** p for a in x) > 1:
            low = tau
        else:
            high = tau
    return [max(0.0, a - low) ** p for a in x]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_entmax(alpha: float, scale: float) -> None:
    s = scale * torch.randn(2, 3, 9, dtype=torch.float64)
    s[0, 1, 4:] = -math.inf
    w = weights(s, alpha)
    for a in range(2):
        for b in range(3):
            want = scalar([x for x in s[a, b].tolist() if x > -math.inf], alpha)
            assert w[a, b, : len(want)].tolist() == pytest.approx(want, abs=1e-9)
    assert not w[0, 1, 4:].any()


def by_sorting(s: Tensor) -> Tensor:
    """Sparsemax by the sorted form of its paper: the support is the largest k with 1 + k s_k > sum of the first k."""
    ordered = s.sort(-1, descending=True).values
    sums, k = ordered.cumsum(-1), torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    size = (1 + k * ordered > sums).sum(-1, keepdim=True)
    return (s - (sums.gather(-1, size - 1) - 1) / size).clamp_min(0)


def quadratic(s: Tensor) -> Tensor:
    """1.5-entmax by sorting: with the k largest of s / 2, tau = mean - sqrt((1 - k variance) / k), the last tau below its s_k."""
    ordered = s.sort(-1, descending=True).values / 2
    k = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    mean, square = ordered.cumsum(-1) / k, ordered.square().cumsum(-1) / k
    tau = mean - ((1 - k * (square - mean.square())) / k).clamp_min(0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (s / 2 - tau.gather(-1, size - 1)).clamp_min(0).square()


@pytest.mark.parametrize("deviation", [0.2, 1.0, 5.0])
def test_the_sorted_forms_of_sparsemax_and_one_and_a_half(deviation: float) -> None:
    s = deviation * torch.randn(50, 300, dtype=torch.float64)
    torch.testing.assert_close(weights(s, 2.0), by_sorting(s), atol=1e-12, rtol=0)
    torch.testing.assert_close(weights(s, 1.5), quadratic(s), atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_shifts_ties_extremes_and_single_keys(alpha: float) -> None:
    s = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(weights(s + 1e4, alpha), weights(s, alpha), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights(torch.full((1, 8), 3.0), alpha), torch.full((1, 8), 1 / 8))
    assert weights(torch.tensor([[1e30, 0.0, -1e30]]), alpha).tolist() == [[1, 0, 0]]
    assert weights(torch.tensor([[-7.0]]), alpha).tolist() == [[1]]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_rows_of_many_keys_sum_to_one(alpha: float) -> None:
    s = 2 * torch.randn(16, 5000)
    w = weights(s, alpha)
    torch.testing.assert_close(w.sum(-1), torch.ones(16), atol=1e-5, rtol=0)
    tolerance = 1e-5 if alpha <= 2 else 1e-2
    torch.testing.assert_close(w, weights(s.double(), alpha).float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_row_without_keys_gives_zeros_and_finite_gradients(alpha: float) -> None:
    s = torch.full((2, 4), -math.inf, dtype=torch.float64)
    s[1, 2] = 3.0
    s.requires_grad_()
    w = weights(s, alpha)
    assert w.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    (grad,) = torch.autograd.grad(w.square().sum(), s)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("alpha", [a for a in ALPHAS if a <= 2])
def test_gradients_against_central_differences(alpha: float) -> None:
    s = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: weights(s, alpha), (s,), atol=1e-6)


@pytest.mark.parametrize("alpha", [2.5, 4.0])
def test_gradients_where_weights_meet_zero_at_a_right_angle(alpha: float) -> None:
    s = torch.tensor([[0.0, 0.05, -0.1, -9.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: weights(s, alpha), (s,), atol=1e-5)


def test_between_softmax_and_sparsemax_the_support_shrinks() -> None:
    s = torch.randn(64, 100, dtype=torch.float64)
    kept = [int((weights(s, a) > 0).sum()) for a in (1.0, 1.25, 1.5, 2.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == s.numel()
    assert kept[-1] < 0.1 * s.numel()


def test_sparsemax_is_a_name_for_entmax_2() -> None:
    assert sc.mechanism("causal + sparsemax") == sc.mechanism("causal + entmax(2.0)")
    assert sc.mechanism("sparsemax").canonical() == "entmax(2.0)"


def test_bad_arguments_and_what_entmax_does_not_have() -> None:
    with pytest.raises(sc.MechanismError, match="alpha must be a number of at least 1"):
        sc.mechanism("entmax(0.5)")
    with pytest.raises(sc.MechanismError, match=r"at least 1.01"):
        sc.mechanism("entmax(1.001)")
    with pytest.raises(sc.MechanismError, match="alibi needs exp"):
        sc.mechanism("causal + alibi + sparsemax")
    q, k, v = qkv(1, 2, 8, 4)
    with pytest.raises(sc.NotSupported, match="rows have no log-denominator"):
        sc.attend(q, k, v, "entmax", need=("lse",))


def test_rows_whose_window_is_empty_have_no_lse_either() -> None:
    q, k, v = qkv(1, 2, 200, 4, keys=40)
    out = sc.attend(q, k, v, "window(8) + entmax", kernel="slab")
    assert not out[:, :, :160].any()
    torch.testing.assert_close(out, sc.reference.attend(q, k, v, "window(8) + entmax"))


def test_memory_at_8k_tokens_is_a_tenth_of_one_dense_matrix() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 8192, 8, dtype=torch.float32))

    def forward_and_backward() -> None:
        torch.autograd.grad(sc.attend(q, k, v, "causal + entmax").sum(), (q, k, v))

    assert largest_temporary(forward_and_backward) <= 8192 * 8192 * 4 / 10
