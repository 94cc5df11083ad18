"""Attention as a graph against loops over nodes; nodes without an edge, padding, adapters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.nn.gin import AGGREGATES, aggregate, edges_of


def written_out(
    how: str, weights: list[float], x: list[list[float]], threshold: float, binary: bool
) -> list[float]:
    """What one node's neighbours come to, channel by channel."""
    kept = [j for j, w in enumerate(weights) if w > threshold]
    found = []
    for channel in range(len(x[0])):
        values = [x[j][channel] for j in kept]
        shares = [1.0 if binary else weights[j] for j in kept]
        if not kept:
            found.append(0.0)
        elif how in ("sum", "mean"):
            total = sum(s * value for s, value in zip(shares, values, strict=True))
            found.append(total / (sum(shares) if how == "mean" else 1))
        elif how == "std":
            mean = sum(values) / len(values)
            found.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
        else:
            found.append(max(values) if how == "max" else min(values))
    return found


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_are_written_out(how: str, binary: bool) -> None:
    weights = torch.softmax(2 * torch.randn(2, 4, 5, dtype=torch.float64), -1)
    weights[0, 2], weights[1, 0] = 0, torch.tensor([0, 0, 0, 1, 0])
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    found = aggregate(how, *edges_of(weights, 0.2, binary), x)
    for b in range(2):
        for i in range(4):
            expected = written_out(how, weights[b, i].tolist(), x[b].tolist(), 0.2, binary)
            torch.testing.assert_close(found[b, i], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("how", AGGREGATES)
def test_gradients_of_aggregates_by_differences(how: str) -> None:
    logits = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)

    def call(logits: Tensor, x: Tensor) -> Tensor:
        return aggregate(how, *edges_of(torch.softmax(logits, -1), 0.15, binary=False), x)

    assert torch.autograd.gradcheck(call, (logits, x))


def test_a_binary_edge_passes_the_gradient_of_its_weight() -> None:
    weights = torch.softmax(torch.randn(4, 5), -1).requires_grad_()
    x = torch.randn(5, 3)
    edges, kept = edges_of(weights, 0.2, binary=True)
    assert torch.equal(edges, kept.float())
    (edges @ x).sum().backward()
    torch.testing.assert_close(weights.grad, x.sum(-1).expand(4, 5) * kept)


@pytest.mark.parametrize("how", AGGREGATES)
def test_a_node_without_edges_or_of_neighbours_alike_has_finite_gradients(how: str) -> None:
    x = torch.ones(1, 3, 2, requires_grad=True)
    weights = torch.tensor([[[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]], requires_grad=True)
    found = aggregate(how, *edges_of(weights, None, binary=False), x)
    assert not found[0, 0].any()
    found.sum().backward()
    assert x.grad.isfinite().all()
    assert weights.grad is None or weights.grad.isfinite().all()
    assert aggregate(how, *edges_of(torch.zeros(1, 2, 0), None, False), torch.zeros(1, 0, 2)).shape == (
        1,
        2,
        2,
    )


@pytest.mark.parametrize("degrees", [False, True])
def test_a_layer_is_its_aggregates_beside_one_another(degrees: bool) -> None:
    layer = sc.nn.GINAttention(8, 2, threshold=0.2, aggregates=AGGREGATES, degrees=degrees).double()
    torch.nn.init.constant_(layer.eps, 0.5)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    weights = layer.attention(x, need=("weights",)).weights
    v = layer.attention.project(x)[2]
    rows = []
    for i in range(5):
        heads = []
        for h in range(2):
            own, terms = 1.5 * v[0, h, i], []
            degree = math.log(1 + int((weights[0, h, i] > 0.2).sum()))
            for how in AGGREGATES:
                t = torch.tensor(
                    written_out(how, weights[0, h, i].tolist(), v[0, h].tolist(), 0.2, False),
                    dtype=torch.float64,
                )
                terms += [t, t * degree, t / (degree or 1)] if degrees else [t]
            heads.append(torch.cat([own + t for t in terms]))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(layer(x)[0], layer.mlp(torch.stack(rows)))


def test_nodes_above_no_threshold_keep_what_they_are() -> None:
    layer = sc.nn.GINAttention(8, 2, threshold=0.9, hidden=0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64) / 100
    own = layer.attention.project(x)[2].transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.mlp(own))
    one = layer(x[:, :1])
    torch.testing.assert_close(one, layer.mlp(2 * own[:, :1]))
    assert layer(x[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("aggregates", [("sum",), ("mean", "max", "min", "std")])
def test_padding_is_no_neighbour(aggregates: tuple[str, ...]) -> None:
    layer = sc.nn.GINAttention(8, 2, "gqa(1) + full", threshold=0.1, aggregates=aggregates).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    lengths = torch.tensor([4, 7])
    dirty = x.masked_fill((torch.arange(7) >= lengths[:, None])[..., None], math.nan)
    found = layer(dirty, key_lengths=lengths)
    torch.testing.assert_close(found[0, :4], layer(x[:1, :4])[0])
    torch.testing.assert_close(found[1], layer(x[1:])[0])


def test_low_precision_sums_in_high() -> None:
    layer = sc.nn.GINAttention(8, 2, threshold=0.1, binary=True, aggregates=AGGREGATES, degrees=True)
    model = sc.nn.Transformer(7, dim=8, depth=1, heads=2, max_length=5)
    sc.nn.add_gin_adapters(model, hidden=2)
    x = torch.randn(2, 5, 8).bfloat16()
    found = layer.bfloat16()(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer.float()(x.float()), atol=0.05, rtol=0.05)
    assert model.bfloat16()(torch.zeros(1, 5, dtype=torch.long)).dtype == torch.bfloat16


def test_what_is_no_graph_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.5"):
        sc.nn.GINAttention(8, 2, threshold=1.5)
    with pytest.raises(ValueError, match=r"one or more of sum, mean, max, min, std, got \('median',\)"):
        sc.nn.GINAttention(8, 2, aggregates=("median",))
    with pytest.raises(ValueError, match=r"Linear has no block of saccade\.nn\.Transformer"):
        sc.nn.add_gin_adapters(torch.nn.Linear(2, 2), hidden=2)
    model = sc.nn.Transformer(7, dim=8, depth=1, heads=2, max_length=5)
    sc.nn.add_gin_adapters(model, hidden=2)
    with pytest.raises(sc.NotSupported, match="reads whole sequences"):
        model.init_state(1)
