"""The Gaussian gate against a loop over its formula, and where values do not vary or do not exist."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc


def written_out(x: list[float], delta: list[float], c: list[float]) -> list[float]:
    """The weights of one row of values: normal densities, their product, over its sum."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    product = [1.0] * len(x)
    for d, width in zip(delta, c, strict=True):
        for t, value in enumerate(x):
            density = math.exp(-((value - mean - d) ** 2) / (2 * variance * width**2))
            product[t] *= density / math.sqrt(2 * math.pi * width**2)
    return [p / sum(product) for p in product]


def gate(gaussians: int, heads: int, axis: str) -> sc.nn.GaussianGate:
    layer = sc.nn.GaussianGate(6, gaussians, heads, axis).double()
    torch.nn.init.uniform_(layer.c, 0.5, 2.0)
    return layer


@pytest.mark.parametrize(("gaussians", "heads"), [(1, 1), (3, 2), (2, 6)])
def test_over_tokens_it_is_the_formula_of_each_feature(gaussians: int, heads: int) -> None:
    layer = gate(gaussians, heads, "tokens")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    w = torch.empty_like(x)
    for b in range(2):
        for feature in range(6):
            h = feature // (6 // heads)
            row = written_out(x[b, :, feature].tolist(), layer.delta[h].tolist(), layer.c[h].tolist())
            w[b, :, feature] = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(layer.weights(x), w, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), x * w, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("gaussians", "heads"), [(1, 1), (3, 2)])
def test_over_features_it_is_the_formula_of_each_token_and_head(gaussians: int, heads: int) -> None:
    layer = gate(gaussians, heads, "features")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    w = torch.empty_like(x)
    size = 6 // heads
    for b in range(2):
        for t in range(5):
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                row = written_out(x[b, t, own].tolist(), layer.delta[h].tolist(), layer.c[h].tolist())
                w[b, t, own] = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(layer.weights(x), w, atol=1e-12, rtol=0)


def test_gradients_by_differences() -> None:
    layer = gate(2, 3, "tokens")
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    delta, c = (p.detach().clone().requires_grad_() for p in (layer.delta, layer.c))
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])

    def call(x: Tensor, delta: Tensor, c: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"delta": delta, "c": c}, (x, mask))

    assert torch.autograd.gradcheck(call, (x, delta, c))


@pytest.mark.parametrize("axis", ["tokens", "features"])
def test_padding_has_no_part_in_it(axis: str) -> None:
    layer = gate(2, 3, axis)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    dirty = x.masked_fill(~mask[..., None], math.nan)
    found = layer(dirty, mask)
    torch.testing.assert_close(found[:1, :4], layer(x[:1, :4]))
    torch.testing.assert_close(found[1:], layer(x[1:]))
    assert not found[0, 4:].any()
    importance = layer.importance(dirty, mask)
    torch.testing.assert_close(importance[:1, :4], layer.importance(x[:1, :4]))


def test_one_token_takes_all_and_none_takes_nothing() -> None:
    layer = gate(2, 3, "tokens")
    one = torch.randn(2, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(one), one)
    assert layer(one[:, :0]).shape == layer(one)[:, :0].shape == (2, 0, 6)
    assert layer.importance(one[:, :0]).shape == (2, 0)
    empty = one.expand(2, 3, 6).clone().requires_grad_()
    found = layer(empty, torch.zeros(2, 3, dtype=torch.bool))
    assert not found.any()
    found.sum().backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_values_that_do_not_vary_share_the_weight_evenly(value: float) -> None:
    layer = sc.nn.GaussianGate(6, 2, 3)
    x = torch.full((1, 8, 6), value, requires_grad=True)
    torch.testing.assert_close(layer.weights(x), torch.full((1, 8, 6), 1 / 8))
    assert not layer.importance(x).any()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_importance_is_the_mean_weight_from_zero_to_one() -> None:
    layer = gate(2, 3, "tokens")
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    mean = layer.weights(x).mean(-1)
    for row, own in zip(layer.importance(x), mean, strict=True):
        torch.testing.assert_close(row, (own - own.min()) / (own.max() - own.min()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_and_finite(dtype: torch.dtype) -> None:
    layer = sc.nn.GaussianGate(6, 2, 3)
    x = torch.randn(2, 50, 6).to(dtype)
    found = layer.to(dtype)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer.float()(x.float()), atol=2e-3, rtol=2e-2)


def test_what_is_no_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="got gaussians=1, heads=4, dim=6"):
        sc.nn.GaussianGate(6, heads=4)
    with pytest.raises(ValueError, match="axis must be tokens or features, got 'time'"):
        sc.nn.GaussianGate(6, axis="time")
    layer = sc.nn.GaussianGate(6, heads=3)
    with pytest.raises(ValueError, match=r"multiple of heads=3, got \(2, 5\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"mask must be boolean \(2, 5\), got torch.float32 \(2, 5\)"):
        layer(torch.zeros(2, 5, 6), torch.ones(2, 5))
