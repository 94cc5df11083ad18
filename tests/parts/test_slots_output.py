"""Slots against a softmax with further columns, output maps against their formulas, with every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc


def loop(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, width: int) -> Tensor:
    """A window of keys and one sink, row by row."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            keys = range(max(0, i - width + 1), i + 1)
            e = [math.exp(float(q[0, h, i] @ k[0, h, j]) / math.sqrt(q.shape[-1])) for j in keys]
            total = sum(e) + math.exp(float(sink[h]))
            for w, j in zip(e, keys, strict=True):
                out[0, h, i] += w / total * v[0, h, j]
    return out


def test_a_sink_takes_its_share_of_every_row() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    sink = torch.tensor([0.7, -1.3], dtype=torch.float64)
    want = loop(q, k, v, sink, 6)
    m = "window(6) + sink_logit"
    usable = [
        c.kernel.name for c in sc.plan(m, (1, 2, 40, 8), dtype=torch.float64).candidates if not c.reasons
    ]
    assert {"chunk", "slab", "reference"} <= set(usable)
    for kernel in usable:
        got = sc.attend(q, k, v, m, params={"sink_logit": sink}, kernel=kernel)
        torch.testing.assert_close(got, want, msg=kernel)


def test_weights_with_a_sink_sum_to_what_it_leaves() -> None:
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64)
    sink = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = sc.attend(q, k, v, "causal + sink_logit", params={"sink_logit": sink}, need=("weights", "lse"))
    assert found.weights is not None
    assert found.lse is not None
    left = 1 - torch.exp(sink[None, :, None] - found.lse)
    torch.testing.assert_close(found.weights.sum(-1), left)
    torch.testing.assert_close(found.weights @ v, found.out)


def test_a_far_sink_is_no_sink_and_a_near_one_takes_all() -> None:
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    plain = sc.attend(q, k, v, "causal")
    none = sc.attend(q, k, v, "causal + sink_logit", params={"sink_logit": torch.full((2,), -50.0)})
    everything = sc.attend(q, k, v, "causal + sink_logit", params={"sink_logit": torch.full((2,), 50.0)})
    torch.testing.assert_close(none, plain)
    assert everything.abs().max() < 1e-12


def test_a_sink_needs_weights_that_are_masses() -> None:
    with pytest.raises(sc.MechanismError, match="sink_logit needs exp"):
        sc.Pairwise(slots=sc.mechanism("sink_logit").slots, normalizer=_NoMass())  # type: ignore[union-attr]


class _NoMass(type(sc.Pairwise().normalizer)):  # type: ignore[misc]
    gives = frozenset()


@pytest.mark.parametrize("text", ["causal + out_norm", "causal + linear + out_norm"])
def test_out_norm_after_any_family(text: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    gain = torch.rand(2, 8, dtype=torch.float64)
    plain = sc.attend(q, k, v, text.removesuffix(" + out_norm"))
    want = torch.empty_like(plain)
    for index in torch.cartesian_prod(*map(torch.arange, plain.shape[:3])).tolist():
        row = plain[tuple(index)]
        want[tuple(index)] = row / math.sqrt(sum(float(x) ** 2 for x in row) / 8 + 1e-6) * gain[index[1]]
    torch.testing.assert_close(sc.attend(q, k, v, text, params={"out_norm": gain}), want)


def test_out_gate() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    gate = torch.randn(1, 2, 9)
    got = sc.attend(q, k, v, "causal + out_gate", streams={"out_gate": gate})
    want = sc.attend(q, k, v, "causal") / (1 + torch.exp(-gate)).unsqueeze(-1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("text", ["causal + sink_logit + out_norm + out_gate", "causal + linear + out_gate"])
def test_a_layer_owns_what_they_learn(text: str) -> None:
    layer = sc.nn.Attention(16, 2, text)
    x = torch.randn(1, 7, 16)
    whole = layer(x)
    whole.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    state, rows = layer.init_state(1), []
    for t in range(7):
        y, state = layer.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole)
