"""The learned feature map against plain loops, and what its cost and limits are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.learned_feature import SoftmaxPair


def written(x: list[float]) -> list[float]:
    """Softmax of the channels, then of their negatives."""
    up, down = ([math.exp(sign * c) for c in x] for sign in (1, -1))
    return [c / sum(up) for c in up] + [c / sum(down) for c in down]


def hedgehog(q: Tensor, k: Tensor, v: Tensor, matrix_q: Tensor, matrix_k: Tensor) -> Tensor:
    """The causal form, one pair at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            rows = [written((matrix_q[h] @ x).tolist()) for x in q[b, h]]
            keys = [written((matrix_k[g] @ x).tolist()) for x in k[b, g]]
            for i, row in enumerate(rows):
                weights = [sum(a * b for a, b in zip(row, keys[j], strict=True)) for j in range(i + 1)]
                for j, w in enumerate(weights):
                    out[b, h, i] += w / sum(weights) * v[b, g, j]
    return out


def test_the_map_and_its_size() -> None:
    x = 3 * torch.randn(1, 2, 3, 4, dtype=torch.float64)
    phi, scale = SoftmaxPair().map(x, "k", None, {})
    assert scale is None
    assert phi.shape[-1] == SoftmaxPair().size(4) == 8
    for row, got in zip(x.flatten(0, 2).tolist(), phi.flatten(0, 2).tolist(), strict=True):
        assert got == pytest.approx(written(row), abs=1e-14)


@pytest.mark.parametrize("kv", [1, 4])
def test_the_causal_form_is_the_written_sum(kv: int) -> None:
    q, (k, v) = torch.randn(2, 4, 9, 6, dtype=torch.float64), torch.randn(2, 2, kv, 9, 6, dtype=torch.float64)
    params = {
        n: torch.randn(heads, 6, 6, dtype=torch.float64) for n, heads in (("matrix_q", 4), ("matrix_k", kv))
    }
    found = sc.attend(q, k, v, f"causal + kv_heads({kv}) + hedgehog", params=params)
    torch.testing.assert_close(found, hedgehog(q, k, v, **params), atol=1e-13, rtol=0)


def test_it_starts_as_the_identity() -> None:
    x = torch.randn(1, 5, 16)
    layer = sc.nn.Attention(16, 2, "causal + hedgehog")
    plain = sc.nn.Attention(16, 2, "causal + softmax_pair + ratio")
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x))


def test_a_matrix_before_softmax_is_a_bilinear_score() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    a, b = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    found = sc.attend(q, k, v, "causal + head_matrix", params={"matrix_q": a, "matrix_k": b})
    product = a.transpose(-1, -2) @ b / 2  # a dot product is divided by the root of 4 channels
    torch.testing.assert_close(found, sc.attend(q, k, v, "causal + bilinear", params={"bilinear": product}))


def test_a_plan_counts_the_matrices() -> None:
    for grad in (False, True):
        for text in ("causal", "causal + softmax_pair + ratio"):
            shape = sc.Shape(2, 4, 64, 16, kv_heads=2)
            few, many = (sc.plan(t, shape, grad=grad).cost.flops for t in (text, f"{text} + head_matrix"))
            assert many - few == (3 if grad else 1) * 2 * (4 + 2) * 64 * 2 * 16**2


def test_rotations_stand_before_it() -> None:
    assert str(sc.mechanism("rope + causal + hedgehog").tokens[0]) == "rope"
    with pytest.raises(sc.MechanismError, match="channel_decay needs channelwise"):
        sc.mechanism("causal + softmax_pair + ratio + channel_decay")
