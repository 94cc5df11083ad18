"""S157, the fixed head size: what a small head cannot express, however long it is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc

pytestmark = pytest.mark.system("S157")
N, DIM = 16, 32


def logits(layer: sc.nn.Attention, x: Tensor) -> Tensor:
    """Logits of every head, (B, H, L, S)."""
    q, k, _ = layer.project(x)
    return q @ k.mT / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("head_dim", [1, 3, 4, 8, 16, 24])
@pytest.mark.parametrize("heads", [1, 4])
def test_logits_have_at_most_the_rank_of_the_head(head_dim: int, heads: int) -> None:
    layer = sc.nn.Attention(DIM, heads, "full", head_dim=head_dim).double()
    ranks = torch.linalg.matrix_rank(logits(layer, torch.randn(2, N, DIM, dtype=torch.float64)))
    assert (ranks == min(head_dim, N)).all()


@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_the_number_of_heads_leaves_the_head_alone(heads: int) -> None:
    layer = sc.nn.Attention(DIM, heads, "full", head_dim=N)
    assert layer.sizes.head_dim == layer.sizes.value_dim == N
    assert layer.query_proj.weight.shape == layer.key_proj.weight.shape == (heads * N, DIM)
    assert layer.out_proj.weight.shape == (DIM, heads * N)
    assert layer(torch.randn(2, 9, DIM)).shape == (2, 9, DIM)


def test_without_a_size_the_heads_divide_the_layer() -> None:
    assert sc.nn.Attention(DIM, 8, "full").sizes.head_dim == DIM // 8
    with pytest.raises(ValueError, match="dim=32 is not divisible by heads=5; give head_dim"):
        sc.nn.Attention(DIM, 5, "full")


def fitted(head_dim: int, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """The error left when query and key projections are trained towards a matrix of weights, and the weights."""
    torch.manual_seed(1)
    layer = sc.nn.Attention(DIM, 1, "full", head_dim=head_dim).double()
    owned = [layer.query_proj.weight, layer.key_proj.weight]
    optimizer = torch.optim.LBFGS(owned, max_iter=400, history_size=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(target * logits(layer, x)[0, 0].log_softmax(-1)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = layer(x, need=("weights",)).weights[0, 0]
    return float((found.detach() - target).square().mean().sqrt()), found


def test_a_head_as_large_as_the_sequence_fits_any_weights_and_a_small_one_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, N, DIM, dtype=torch.float64)
    target = torch.softmax(2 * torch.randn(N, N, dtype=torch.float64), -1)
    large, weights = fitted(N, x, target)
    small, _ = fitted(4, x, target)
    assert large < 1e-3, large
    assert small > 10 * max(large, 1e-3), small
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, dtype=torch.float64))


def test_one_less_than_the_sequence_is_enough() -> None:
    """A constant added to a row of logits changes nothing, so weights over n keys need rank n - 1."""
    target = torch.softmax(torch.randn(N, N, dtype=torch.float64), -1)
    wanted = target.log() - target.log().mean(-1, keepdim=True)
    u, s, v = torch.linalg.svd(wanted)
    errors = {}
    for rank in (4, N - 1):
        q, k = u[:, :rank] * s[:rank], v[:rank].T
        q, k = (y[None, None].contiguous() for y in (q * math.sqrt(rank), k))
        eye = torch.eye(N, dtype=torch.float64)[None, None]
        errors[rank] = float((sc.attend(q, k, eye, "full")[0, 0] - target).square().mean().sqrt())
    assert errors[N - 1] < 1e-14
    assert errors[4] > 0.01
