"""S187, Performer: positive random features that estimate the softmax kernel."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from saccade.parts.feature import Favor
from systems.helpers import dense, flops, qkv, stepwise, train

DRAWS, D = 20_000, 8
pytestmark = pytest.mark.system("S187")


@functools.cache
def drawn(rows: str) -> Tensor:
    """20,000 draws of 64 rows; the first 16 or 32 of them are draws for as many features."""
    sizes = Sizes(DRAWS, DRAWS, D, D)
    return Favor(64, rows).buffers(sizes, torch.Generator().manual_seed(0))["favor"].double()


def estimates(rows: str, features: int, q: Tensor, k: Tensor) -> Tensor:
    """phi(q).phi(k) of every draw, for one pair of vectors, (draws,)."""
    w = {"favor": drawn(rows)[:, :features]}
    sides = []
    for x, side in ((q, "q"), (k, "k")):
        phi, scale = Favor(features, rows).map(x.expand(1, DRAWS, 1, D), side, None, w)
        sides.append(phi * scale.exp().unsqueeze(-1))
    return (sides[0] * sides[1]).sum(-1).flatten()


def pairs(count: int = 8, norm: float = 0.5) -> list[tuple[Tensor, Tensor, float]]:
    """Vectors of one norm after the scaling by d^(-1/4), and the kernel's exact value; far ones need more draws."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        q, k = torch.randn(2, D, dtype=torch.float64, generator=generator)
        q, k = (x / x.norm() * norm * D**0.25 for x in (q, k))
        found.append((q, k, math.exp(float(q @ k) / math.sqrt(D))))
    return found


def mean_square_error(rows: str, features: int) -> float:
    errors = [(estimates(rows, features, q, k) - exact).square().mean() for q, k, exact in pairs()]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("rows", ["orthogonal", "independent"])
@pytest.mark.parametrize("features", [16, 64])
def test_the_kernel_estimate_has_no_bias(rows: str, features: int) -> None:
    for q, k, exact in pairs():
        found = estimates(rows, features, q, k)
        assert abs(found.mean() - exact) <= 4 * found.std() / DRAWS**0.5


@pytest.mark.parametrize("rows", ["orthogonal", "independent"])
def test_the_error_halves_when_features_double(rows: str) -> None:
    errors = [mean_square_error(rows, features) for features in (16, 32, 64)]
    for few, many in itertools.pairwise(errors):
        assert 0.4 <= many / few <= 0.6


@pytest.mark.parametrize("features", [16, 32, 64])
def test_orthogonal_rows_are_no_worse_than_independent_ones(features: int) -> None:
    assert mean_square_error("orthogonal", features) <= mean_square_error("independent", features)


def test_rows_are_orthogonal_within_blocks_and_as_long_as_normal_vectors() -> None:
    w = drawn("orthogonal")[:100]
    for start in range(0, 64, D):
        block = w[:, start : start + D]
        gram = block @ block.transpose(-1, -2)
        assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-5
    squares = drawn("orthogonal").square().sum(-1)
    assert abs(float(squares.mean()) - D) < 0.02
    assert abs(float(squares.var()) - 2 * D) < 0.2
    assert abs(float(drawn("orthogonal").mean())) < 0.002


def features_of(q: Tensor, k: Tensor, features: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A buffer, and the true features of queries and keys."""
    part = Favor(features)
    w = part.buffers(
        Sizes(q.shape[1], k.shape[1], q.shape[-1], q.shape[-1]), torch.Generator().manual_seed(0)
    )
    sides = []
    for x in (q, k):
        x = x * x.shape[-1] ** -0.25
        phi = torch.exp(x @ w["favor"].to(x.dtype).transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2)
        sides.append(phi / math.sqrt(features))
    return w, sides[0], sides[1]


@pytest.mark.parametrize("length", [1, 40, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_the_state_form_equals_the_masked_product_of_features(length: int, causal: bool) -> None:
    q, k, v = qkv(2, 3, length, D)
    w, phi_q, phi_k = features_of(q, k, 24)
    a = phi_q @ phi_k.transpose(-1, -2)
    a = a.tril() if causal else a
    text = "causal + performer_favor(24)" if causal else "performer_favor(24)"
    expected = a @ v / a.sum(-1, keepdim=True)
    torch.testing.assert_close(sc.attend(q, k, v, text, buffers=w), expected, atol=1e-10, rtol=0)
    single = sc.attend(q.float(), k.float(), v.float(), text, buffers=w)
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_large_inputs_stay_finite(scale: float) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 50, D, dtype=torch.float32))
    w, _, _ = features_of(q, k, 32)
    out = sc.attend(q * scale, k * scale, v, "causal + performer_favor(32)", buffers=w)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_more_features_come_closer_to_softmax_attention() -> None:
    q, k, v = qkv(2, 4, 64, 16)
    q, k = 0.4 * q, 0.4 * k
    errors = []
    for features in (16, 256, 4096):
        w, _, _ = features_of(q, k, features)
        found = sc.attend(q, k, v, f"performer_favor({features})", buffers=w)
        errors.append(float((found - dense(q, k, v)).norm() / dense(q, k, v).norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_decoding_equals_the_whole_call_with_a_state_of_one_size() -> None:
    layer = sc.nn.Attention(32, 4, "causal + performer_favor(16)").double()
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    outs, held = stepwise(layer, x)
    torch.testing.assert_close(outs, layer(x), atol=1e-10, rtol=0)
    assert len(set(held)) == 1


def test_features_are_redrawn_on_request_alone() -> None:
    layer = sc.nn.Attention(32, 4, "performer_favor(16)", generator=torch.Generator().manual_seed(0))
    same = sc.nn.Attention(32, 4, "performer_favor(16)", generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.favor, same.favor)
    before, x = layer.favor.clone(), torch.randn(1, 9, 32)
    layer(x)
    assert torch.equal(layer.favor, before)
    layer.refresh(x, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(layer.favor, before)
    same.refresh(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer.favor, same.favor)


@pytest.mark.parametrize("text", ["performer_favor(64)", "causal + performer_favor(64)"])
@pytest.mark.parametrize("n", [4096, 8192])
def test_doubling_the_length_doubles_the_cost(text: str, n: int) -> None:
    def cost(n: int) -> tuple[int, int, int]:
        q, k, v = qkv(1, 1, n, 16, dtype=torch.float32)
        w, _, _ = features_of(q, k, 64)
        planned = sc.plan(text, (1, 1, n, 16)).cost
        return flops(lambda: sc.attend(q, k, v, text, buffers=w)), planned.flops, planned.peak

    for small, large in zip(cost(n), cost(2 * n), strict=True):
        assert large <= 2.4 * small


def test_a_layer_learns_to_copy_a_softmax_layer() -> None:
    teacher = sc.nn.Attention(32, 2, "causal + transformer")
    layer = sc.nn.Attention(32, 2, "causal + performer_favor(64)")
    errors = []

    def loss(step: int) -> Tensor:
        x = 2 * torch.randn(16, 32, 32)
        error = (layer(x) - teacher(x).detach()).square().mean() / teacher(x).detach().var()
        errors.append(float(error.detach()))
        return error

    last = train(layer.parameters(), loss, steps=150)
    assert last < 0.3 * errors[0]
