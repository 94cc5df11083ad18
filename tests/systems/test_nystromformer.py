"""S233, Nystromformer: softmax attention through landmarks and an iterative inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.systems.nystromformer import iterative_inverse, segment_means
from systems.helpers import dense, flops, qkv, train

pytestmark = pytest.mark.system("S233")


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("n", [8, 32])
def test_as_many_landmarks_as_tokens_and_twenty_iterations_give_softmax_attention(n: int) -> None:
    q, k, v = qkv(2, 3, n, 8)
    found = sc.attend(q, k, v, f"nystromformer({n}, iterations=20, taps=0)")
    assert distance(found, dense(q, k, v)) <= 1e-3


@pytest.mark.parametrize("m", [4, 16, 32])
def test_the_iterative_inverse_equals_the_pseudo_inverse(m: int) -> None:
    a = torch.softmax(
        4 * torch.eye(m, dtype=torch.float64) + torch.randn(3, m, m, dtype=torch.float64) / 2, -1
    )
    assert torch.linalg.cond(a).max() < 100
    exact = torch.linalg.pinv(a)
    for iterations in (12, 20):
        assert distance(iterative_inverse(a, iterations), exact) < 1e-9
    assert distance(iterative_inverse(a, 1), exact) > 0.01


def test_six_iterations_are_an_approximation() -> None:
    a = torch.softmax(torch.randn(16, 16, dtype=torch.float64), -1)
    eye = torch.eye(16, dtype=torch.float64)
    residual = [float((a @ iterative_inverse(a, n) - eye).norm() / eye.norm()) for n in (6, 12, 20)]
    assert residual[0] > 0.05
    assert residual[0] > residual[1] > residual[2]
    assert residual[2] < 1e-6


def test_the_error_falls_with_landmarks() -> None:
    """On tokens that drift slowly, as segment means assume."""
    drift = torch.randn(2, 2, 128, 16, dtype=torch.float64).cumsum(2) / 8
    q, k, v = (drift + 0.1 * torch.randn_like(drift) for _ in range(3))
    errors = [
        distance(sc.attend(q, k, v, f"nystromformer({m}, iterations=20, taps=0)"), dense(q, k, v))
        for m in (4, 16, 64, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0] / 4


@pytest.mark.parametrize("n", [1, 7, 20])
@pytest.mark.parametrize("landmarks", [1, 4, 7, 20])
def test_segments_are_near_equal_and_cover_the_valid_tokens(n: int, landmarks: int) -> None:
    x, lengths = torch.randn(1, 1, 20, 3, dtype=torch.float64), torch.tensor([n])
    valid = torch.arange(20) < lengths[:, None]
    found = segment_means(x, landmarks, valid)[0, 0]
    members = [[t for t in range(n) if t * landmarks // n == s] for s in range(landmarks)]
    sizes = [len(m) for m in members]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    for row, m in zip(found, members, strict=True):
        torch.testing.assert_close(row, x[0, 0, m].mean(0) if m else torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("taps", [0, 5])
def test_padding_is_excluded_from_segment_means(taps: int) -> None:
    q, k, v = qkv(3, 2, 24, 8)
    text, lengths = f"nystromformer(4, taps={taps})", torch.tensor([24, 10, 5])
    params = {"taps": torch.randn(2, taps, dtype=torch.float64)} if taps else {}
    found = sc.attend(q, k, v, text, key_lengths=lengths, params=params)
    gone = (torch.arange(24) >= lengths[:, None])[:, None, :, None]
    poisoned = [x.masked_fill(gone, 1e6) for x in (q, k, v)]
    again = sc.attend(*poisoned, text, key_lengths=lengths, params=params)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        short = sc.attend(q[one, :, :n], k[one, :, :n], v[one, :, :n], text, params=params)
        torch.testing.assert_close(found[one, :, :n], short, atol=1e-10, rtol=0)
        torch.testing.assert_close(again[one, :, :n], short, atol=1e-10, rtol=0)


def test_the_skip_is_a_depthwise_convolution_of_the_values() -> None:
    q, k, v = qkv(2, 2, 15, 4)
    taps = torch.randn(2, 5, dtype=torch.float64)
    skip = sc.attend(q, k, v, "nystromformer(4, taps=5)", params={"taps": taps}) - sc.attend(
        q, k, v, "nystromformer(4, taps=0)"
    )
    expected = torch.zeros_like(v)
    for t in range(15):
        for tap in range(5):
            if 0 <= t + tap - 2 < 15:
                expected[:, :, t] += taps[:, tap, None] * v[:, :, t + tap - 2]
    torch.testing.assert_close(skip, expected, atol=1e-12, rtol=0)


def test_there_is_no_causal_form() -> None:
    with pytest.raises(sc.NotSupported, match="performer_favor"):
        sc.causal(sc.mechanism("nystromformer"))
    with pytest.raises(sc.NotSupported, match="moba"):
        sc.nn.Transformer(vocab=8, dim=16, depth=1, heads=2, mechanism="nystromformer")


@pytest.mark.parametrize("n", [1024, 2048])
def test_doubling_the_length_doubles_the_cost(n: int) -> None:
    def cost(n: int) -> tuple[int, int, int]:
        q, k, v = qkv(1, 2, n, 16, dtype=torch.float32)
        planned = sc.plan("nystromformer(taps=0)", (1, 2, n, 16)).cost
        return flops(lambda: sc.attend(q, k, v, "nystromformer(taps=0)")), planned.flops, planned.peak

    for small, large in zip(cost(n), cost(2 * n), strict=True):
        assert large <= 2.3 * small


def test_a_layer_learns_to_copy_a_softmax_layer() -> None:
    teacher = sc.nn.Attention(32, 2, "transformer")
    layer = sc.nn.Attention(32, 2, "nystromformer(16, taps=3)")
    errors = []

    def loss(step: int) -> Tensor:
        x = 2 * torch.randn(16, 32, 32)
        error = (layer(x) - teacher(x).detach()).square().mean() / teacher(x).detach().var()
        errors.append(float(error.detach()))
        return error

    last = train(layer.parameters(), loss, steps=150)
    assert last < 0.3 * errors[0]
