"""S131, Fastmax: a polynomial of first or second order in place of the exponential, as moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.memory import SignedRatio
from systems.helpers import flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S131")


def standardised(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)


def weights(q: Tensor, k: Tensor, order: int, causal: bool) -> Tensor:
    """f(Q K^T), dense, of which each row has its sum still to be divided by."""
    s = standardised(q) @ standardised(k.repeat_interleave(q.shape[1] // k.shape[1], 1)).mT
    w = 1 + s + (s * s / 2 if order == 2 else 0)
    return w.tril() if causal else w


def dense(q: Tensor, k: Tensor, v: Tensor, order: int, causal: bool) -> Tensor:
    w = weights(q, k, order, causal)
    total = w.sum(-1, keepdim=True)
    if order == 1:
        total = torch.where(total.abs() < 0.01, 0.01 * torch.where(total < 0, -1.0, 1.0), total)
    return w @ v.repeat_interleave(q.shape[1] // k.shape[1], 1) / total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kv", [1, 4])
def test_moments_equal_the_dense_matrix_and_its_gradients(order: int, causal: bool, kv: int) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 150, 6, kv=kv))
    text = f"{'causal + ' if causal else ''}fastmax({order})"
    found, expected = sc.attend(q, k, v, text, kernel="recurrent"), dense(q, k, v, order, causal)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, atol=1e-10 * scale, rtol=1e-8)
    grads = [torch.autograd.grad(x.tanh().sum(), (q, k, v)) for x in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-8 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_steps_equal_the_whole(order: int) -> None:
    layer = sc.nn.Attention(32, 4, f"gqa(2) + causal + fastmax({order})").double()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-9, rtol=1e-7)
    size = {1: 9, 2: 45}[order]
    assert held == [2 * 2 * (size * 8 + size + 1) * 8] * 30


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_second_order_weights_are_not_negative(size: float) -> None:
    q, k, v = (size * x for x in qkv(1, 2, 60, 8))
    found = sc.attend(q, k, v, "fastmax", need=("out", "weights"))
    assert found.weights is not None
    assert float(found.weights.min()) >= 0
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, 2, 60, dtype=torch.float64))


def cancelling() -> tuple[Tensor, Tensor, Tensor]:
    """One query and three keys whose first-order weights are 3, -1 and -1, their sum 1."""
    q = torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64)
    k = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)[None, None]
    return q, k, torch.randn(1, 1, 3, 2, dtype=torch.float64)


def test_first_order_weights_may_be_negative_and_nothing_hides_it() -> None:
    """Standardised vectors of two channels are (1, -1) or (-1, 1): s is 2 or -2, a weight 3 or -1."""
    q, k, v = cancelling()
    found = sc.attend(q, k, v, "fastmax(1)", need=("out", "weights"))
    assert found.weights is not None
    wanted = torch.tensor([3.0, -1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(found.weights[0, 0, 0], wanted, atol=1e-4, rtol=0)
    with pytest.raises(sc.NotSupported, match="no row denominator, so no lse"):
        sc.attend(q, k, v, "fastmax(1)", need=("out", "lse"))


@pytest.mark.parametrize("kernel", ["recurrent", "reference"])
def test_a_sum_near_zero_is_bounded_and_keeps_its_sign(kernel: str) -> None:
    """One key weighs 3, three weigh -1 each: the sum is zero up to rounding."""
    q, k, v = cancelling()
    k, v = torch.cat((k, k[:, :, 1:2]), 2), torch.randn(1, 1, 4, 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sc.attend(*leaves, "fastmax(1)", kernel=kernel)
    sign = -1 if float(weights(q, k, 1, False).detach().sum()) < 0 else 1
    wanted = sign * (3 * v[:, :, :1] - v[:, :, 1:].sum(2, keepdim=True)) / 0.01
    torch.testing.assert_close(out, wanted, atol=0, rtol=1e-3)
    assert all(bool(torch.isfinite(x).all()) for x in torch.autograd.grad(out.sum(), leaves))
    wide = sc.attend(*leaves, "fastmax(1, floor=0.5)", kernel=kernel)
    torch.testing.assert_close(50 * wide, out, atol=0, rtol=1e-6)


def test_the_floor_leaves_larger_sums_alone() -> None:
    total = torch.tensor([-3.0, -0.02, -0.005, 0.0, 0.005, 0.02, 3.0])
    found = SignedRatio(0.01).divide(torch.ones(7), total)
    torch.testing.assert_close(found, 1 / torch.tensor([-3.0, -0.02, -0.01, 0.01, 0.01, 0.02, 3.0]))


def test_what_is_refused() -> None:
    for text, words in (
        ("fastmax(3)", "order must be 1 or 2, got 3"),
        ("fastmax(1, floor=0)", "floor must be a number above 0"),
        ("taylor(1) + ratio", "ratio needs denominator, which taylor breaks"),
        ("causal + favor(8) + signed_ratio", "favor needs ratio"),
    ):
        with pytest.raises(sc.MechanismError, match=words):
            sc.mechanism(text)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_doubling_the_length_doubles_the_cost(order: int, causal: bool) -> None:
    text = f"{'causal + ' if causal else ''}fastmax({order})"

    def cost(n: int) -> tuple[int, int]:
        q, k, v = (torch.zeros(1, 1, n, 32) for _ in range(3))
        return flops(lambda: sc.attend(q, k, v, text)), sc.plan(text, (1, 1, n, 32)).cost.flops

    for small, large in zip(cost(4096), cost(8192), strict=True):
        assert 1.9 * small <= large <= 2.1 * small


def test_a_layer_learns_to_copy_a_softmax_layer() -> None:
    teacher, layer = (sc.nn.Attention(32, 2, f"causal + {m}") for m in ("full", "fastmax"))
    errors = []

    def loss(step: int) -> Tensor:
        x = 2 * torch.randn(16, 32, 32)
        wanted = teacher(x).detach()
        error = (layer(x) - wanted).square().mean() / wanted.var()
        errors.append(float(error.detach()))
        return error

    assert train(layer.parameters(), loss, steps=150) < 0.5 * errors[0]
