"""Weights that need no sum of one, against plain loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.parts.normalizer import Normalizer
from saccade.parts.pointwise import Laplace, Relu, RowStandard, Sigmoid, Unnormalized

H, L, S = 2, 5, 7
GAIN, BIAS = torch.tensor([1.5, -0.4], dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)
PARAMS = {"row_gain": GAIN, "row_bias": BIAS}


def rows(normalizer: Normalizer, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Weights of every pair of a masked call."""
    params = PARAMS if isinstance(normalizer, RowStandard) else {}
    program = tools.bound(sc.Pairwise(normalizer=normalizer), q, k, params=params, mask=mask)
    w, lse = program.weights(tools.tile(program))
    assert lse is None
    return w


def weigh(normalizer: Normalizer, head: int, row: list[float]) -> list[float]:
    """The weights of one row of logits, from the papers."""
    if isinstance(normalizer, Relu):
        return [max(0.0, s) for s in row]
    if isinstance(normalizer, Unnormalized):
        return row
    if isinstance(normalizer, Laplace):
        mean, deviation = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
        return [(1 + math.erf((s - mean) / (deviation * math.sqrt(2)))) / 2 for s in row]
    if isinstance(normalizer, Sigmoid):
        shift = math.log(len(row)) if normalizer.counted and row else 0.0
        return [1 / (1 + math.exp(shift - s)) for s in row]
    assert isinstance(normalizer, RowStandard)
    if not row:
        return []
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in row) / len(row))
    return [float(GAIN[head]) * (s - mean) / (deviation + normalizer.eps) + float(BIAS[head]) for s in row]


@pytest.mark.parametrize(
    "normalizer",
    [Relu(), Laplace(), Unnormalized(), Sigmoid(), Sigmoid(False), RowStandard(), RowStandard(0.5)],
)
def test_weights_of_a_masked_row(normalizer: Normalizer) -> None:
    q, k = (torch.randn(1, H, n, 4, dtype=torch.float64) for n in (L, S))
    mask = torch.rand(1, H, L, S) < 0.6
    mask[0, 0, 1], mask[0, 1, 2] = False, torch.arange(S) == 3
    w = rows(normalizer, q, k, mask)
    for h in range(H):
        for i in range(L):
            keys = [j for j in range(S) if mask[0, h, i, j]]
            want = weigh(normalizer, h, [float(q[0, h, i] @ k[0, h, j]) / 2 for j in keys])
            assert w[0, h, i, keys].tolist() == pytest.approx(want, abs=1e-12)
            assert w[0, h, i].count_nonzero() <= len(keys)


@pytest.mark.parametrize(
    "text", ["relu", "laplace", "unnormalized", "sigmoid", "sigmoid(false)", "row_standard"]
)
def test_gradients_are_those_of_the_definition_and_finite_in_empty_rows(text: str) -> None:
    q, k, v = (torch.randn(1, H, n, 3, dtype=torch.float64, requires_grad=True) for n in (L, S, S))
    mask = torch.rand(1, H, L, S) < 0.7
    mask[0, 0, 1], mask[0, 1, 2] = False, torch.arange(S) == 3
    params = {n: x.clone().requires_grad_() for n, x in PARAMS.items()} if text == "row_standard" else {}

    def call(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        return sc.attend(q, k, v, text, mask=mask, params=dict(zip(params, weights, strict=True)))

    assert torch.autograd.gradcheck(call, (q, k, v, *params.values()))


def test_equal_logits_get_the_bias_and_no_gradient_through_the_deviation() -> None:
    s = torch.zeros(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    program = tools.bound(
        sc.Pairwise(normalizer=RowStandard()), torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 4, 1), params=PARAMS
    )
    w, _ = RowStandard().normalize(s, tools.tile(program))
    torch.testing.assert_close(w, BIAS.view(1, 2, 1, 1).expand_as(w))
    assert torch.isfinite(torch.autograd.grad(w.sum(), s)[0]).all()


@pytest.mark.parametrize("text", ["relu", "laplace", "unnormalized", "sigmoid(false)"])
def test_parts_of_the_keys_add_up(text: str) -> None:
    q, k, v = torch.randn(3, 1, H, 9, 4, dtype=torch.float64)
    parts = [sc.attend(q, k[:, :, c], v[:, :, c], text) for c in (slice(0, 3), slice(3, 9))]
    torch.testing.assert_close(parts[0] + parts[1], sc.attend(q, k, v, text), atol=1e-12, rtol=0)


def test_laplace_meets_the_squared_relu_in_value_and_slope() -> None:
    s = torch.tensor([[math.sqrt(1 / 2)]], dtype=torch.float64, requires_grad=True)
    values = Laplace().normalize(s)[0], torch.relu(s).square()
    slopes = [float(torch.autograd.grad(x.sum(), s)[0]) for x in values]
    assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-12)
