"""Channel, spatial and sentence gates against loops, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def squeezed(pooled: list[float], down: Tensor, up: Tensor) -> list[float]:
    """up relu(down pooled), by loops."""
    inner = [max(0.0, sum(float(row[c]) * pooled[c] for c in range(len(pooled)))) for row in down]
    return [sum(float(row[n]) * inner[n] for n in range(len(inner))) for row in up]


@pytest.mark.parametrize("places", [(5,), (3, 4), (2, 3, 2)])
def test_channel_gate_is_the_loop(places: tuple[int, ...]) -> None:
    layer = sc.nn.ChannelGate(4, ratio=2).double()
    x = torch.randn(2, 4, *places, dtype=torch.float64)
    down, up = (p.detach() for p in layer.parameters())
    expected = torch.empty_like(x)
    for b in range(2):
        channels = [x[b, c].flatten().tolist() for c in range(4)]
        mean = squeezed([sum(c) / len(c) for c in channels], down, up)
        most = squeezed([max(c) for c in channels], down, up)
        for c in range(4):
            expected[b, c] = x[b, c] * sigmoid(mean[c] + most[c])
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_spatial_gate_is_the_loop() -> None:
    layer = sc.nn.SpatialGate(size=3).double()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    filters = layer.conv.weight.detach()[0]
    expected = torch.empty_like(x)
    for b in range(2):
        for row in range(4):
            for column in range(6):
                s = 0.0
                for down in range(-1, 2):
                    for right in range(-1, 2):
                        r, c = row + down, column + right
                        if 0 <= r < 4 and 0 <= c < 6:
                            place = x[b, :, r, c].tolist()
                            s += float(filters[0, down + 1, right + 1]) * sum(place) / 5
                            s += float(filters[1, down + 1, right + 1]) * max(place)
                expected[b, :, row, column] = x[b, :, row, column] * sigmoid(s)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_sentence_gate_is_the_loop() -> None:
    layer = sc.nn.SentenceGate(4, sentence_dim=3, ratio=2).double()
    x, e = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    down, down_bias, up, up_bias = (p.detach().tolist() for p in layer.parameters())
    expected = torch.empty_like(x)
    for b in range(2):
        joined = [float(x[b, c].mean()) for c in range(4)] + e[b].tolist()
        inner = [
            max(0.0, bias + sum(w * j for w, j in zip(row, joined, strict=True)))
            for row, bias in zip(down, down_bias, strict=True)
        ]
        for c in range(4):
            s = up_bias[c] + sum(w * n for w, n in zip(up[c], inner, strict=True))
            expected[b, c] = x[b, c] * sigmoid(s)
    torch.testing.assert_close(layer(x, e), expected, atol=1e-12, rtol=0)


def test_gradients_by_differences() -> None:
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    e = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sc.nn.CBAM(4, ratio=2, size=3).double(), (x,))
    assert torch.autograd.gradcheck(sc.nn.SentenceGate(4, 3, ratio=2).double(), (x, e))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_cbam_counts_its_parameters_and_keeps_shapes(axes: int) -> None:
    layer = sc.nn.CBAM(8, ratio=4, size=5, axes=axes)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 8 * 8 // 4 + 2 * 5**axes
    x = torch.randn(2, 8, *[3] * axes)
    assert layer(x).shape == x.shape
    assert layer.channel.gate(x).shape == (2, 8, *[1] * axes)
    assert layer.spatial.gate(x).shape == (2, 1, *[3] * axes)


def test_a_map_of_one_place_and_a_batch_of_none() -> None:
    layer = sc.nn.CBAM(4, ratio=2)
    x = torch.randn(2, 4, 1, 1)
    mean = layer.channel.mlp(x.flatten(1))
    torch.testing.assert_close(layer.channel(x), x * torch.sigmoid(2 * mean)[..., None, None])
    assert layer(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ratio must be a whole number that divides the 12 channels, got ratio=16"
    ):
        sc.nn.CBAM(12)
    with pytest.raises(ValueError, match="size must be odd"):
        sc.nn.SpatialGate(size=4)
    with pytest.raises(ValueError, match="axes must be 1, 2 or 3, got 4"):
        sc.nn.SpatialGate(axes=4)
    with pytest.raises(
        ValueError, match=r"must be \(batch, 4, ...\) with one or more axes of places, got \(2, 3, 5\)"
    ):
        sc.nn.ChannelGate(4, ratio=2)(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"with 2 axes of places, got \(2, 3, 5\)"):
        sc.nn.SpatialGate()(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"without places has nothing to pool, got \(2, 4, 0, 5\)"):
        sc.nn.CBAM(4, ratio=2)(torch.zeros(2, 4, 0, 5))
    with pytest.raises(ValueError, match=r"sentence vectors must be \(2, 3\), got \(2, 4\)"):
        sc.nn.SentenceGate(4, 3, ratio=2)(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4))
