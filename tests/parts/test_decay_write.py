"""Decays and writes against the recurrence itself, token by token in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.kernels import gated
from saccade.parts.decay import FixedDecay

TEXTS = [
    "causal + identity + gate_decay(2)",
    "causal + identity + channel_decay(2)",
    "causal + elu1 + ratio + gate_decay(2)",
    "causal + elu1 + ratio + channel_decay(2)",
    "causal + identity + step_decay + step_write",
    "causal + identity + step_write",
    "causal + identity + delta",
    "causal + identity + delta(2) + gate_decay(2)",
    "causal + identity + delta + channel_decay(2)",
    "causal + elu1 + delta + step_decay",
]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def recurrence(text: str, q: Tensor, k: Tensor, v: Tensor, streams: dict[str, Tensor], rate: float) -> Tensor:
    """The output of one head, token by token; streams are (n,) or (n, d)."""

    def phi(x: list[float]) -> list[float]:
        return [c + 1 if c > 0 else math.exp(c) for c in x] if "elu1" in text else x

    (n, d), e = q.shape, v.shape[1]
    state, norm, rows = [[0.0] * e for _ in range(d)], [0.0] * d, []
    for t in range(n):
        key, query, value = phi(k[t].tolist()), phi(q[t].tolist()), v[t].tolist()
        keep, strength = [1.0] * d, 1.0
        if "gate_decay" in text:
            keep = [sigmoid(float(streams["forget"][t])) ** 0.5] * d
        if "channel_decay" in text:
            keep = [sigmoid(x) ** 0.5 for x in streams["forget"][t].tolist()]
        if "step_decay" in text:
            keep = [math.exp(-softplus(float(streams["step"][t])) * math.exp(rate))] * d
        if "step_write" in text:
            strength = softplus(float(streams["step"][t]))
        state = [[keep[m] * state[m][c] for c in range(e)] for m in range(d)]
        norm = [keep[m] * norm[m] + strength * key[m] for m in range(d)]
        if "delta" in text:
            strength = (2 if "delta(2)" in text else 1) * sigmoid(float(streams["beta"][t]))
            held = [sum(key[m] * state[m][c] for m in range(d)) for c in range(e)]
            value = [value[c] - held[c] for c in range(e)]
        state = [[state[m][c] + strength * key[m] * value[c] for c in range(e)] for m in range(d)]
        below = sum(query[m] * norm[m] for m in range(d)) if "ratio" in text else 1.0
        rows.append([sum(query[m] * state[m][c] for m in range(d)) / below for c in range(e)])
    return torch.tensor(rows, dtype=torch.float64)


def drawn(text: str, n: int, groups: int = 2) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    m = sc.mechanism(text)
    sizes = sc.parts.base.Sizes(2, groups, 3, 4)
    qkv = [torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((2, 3), (groups, 3), (groups, 4))]
    qkv[1] = torch.nn.functional.normalize(qkv[1], dim=-1)
    params = {name: torch.randn(w.shape, dtype=torch.float64) for name, w in m.weights(sizes).items()}
    streams = {
        name: torch.randn(s.shape(2, 2, n), dtype=torch.float64) for name, s in m.streams(sizes).items()
    }
    return qkv, {"params": params, "streams": streams}


@pytest.mark.parametrize("text", TEXTS)
def test_the_parallel_form_and_the_chunks_are_the_recurrence(text: str) -> None:
    for n in (7, 83):
        (q, k, v), named = drawn(text, n)
        for got in (
            reference.attend(q, k, v, text, **named),
            sc.attend(q, k, v, text, kernel="recurrent", **named),
        ):
            for b in range(2):
                for h in range(2):
                    own = {name: x[b, h] for name, x in named["streams"].items()}
                    rate = float(named["params"]["rate"][h]) if "rate" in named["params"] else 0.0
                    want = recurrence(text, q[b, h], k[b, h], v[b, h], own, rate)
                    torch.testing.assert_close(got[b, h], want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_longer_than_a_group_agree_with_the_definition_and_its_gradients(text: str) -> None:
    (q, k, v), named = drawn(text, gated.CHUNK * gated.GROUP + 70)
    leaves = [x.requires_grad_() for x in (q, k, v, *named["params"].values(), *named["streams"].values())]
    found = [
        sc.attend(q, k, v, text, kernel="recurrent", **named),
        reference.attend(q, k, v, text, **named),
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(found[0])
    grads = [torch.autograd.grad(out, leaves, weight) for out in found]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("text", TEXTS)
def test_query_heads_of_a_group_share_the_mean_of_what_they_bring(text: str) -> None:
    (q, k, v), named = drawn(text, 70, groups=1)
    alike = {n: x.mean(1, keepdim=True).expand_as(x) for n, x in named["streams"].items()}
    found = [sc.attend(q, k, v, text, params=named["params"], streams=s) for s in (named["streams"], alike)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)
    kept = reference.attend(q, k, v, text, **named)
    torch.testing.assert_close(found[0], kept, rtol=1e-10, atol=1e-11)


def test_fixed_decay_is_one_minus_a_power_of_two() -> None:
    c = reference.context(*torch.randn(3, 1, 4, 2, 2, dtype=torch.float64))
    for first in (5.0, 1.0, 2.5):
        got = FixedDecay(first).log(c).exp().flatten()
        assert got.tolist() == pytest.approx([1 - 2 ** (-first - h) for h in range(4)], abs=1e-14)


def test_hard_decays_neither_overflow_nor_blur_what_follows() -> None:
    """A token that forgets nearly everything: later weights keep float32's precision."""
    text = "causal + identity + step_decay"
    (q, k, v), named = drawn(text, 130)
    named["streams"]["step"][:] = -4.0
    named["streams"]["step"][:, :, 60] = 3000.0
    low = {kind: {n: x.float() for n, x in d.items()} for kind, d in named.items()}
    got = sc.attend(q.float(), k.float(), v.float(), text, kernel="recurrent", **low)
    want = reference.attend(q, k, v, text, **named)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("identity + gate_decay", "needs an order: add `causal`"),
        ("identity + delta", "needs an order: add `causal`"),
        ("causal + elu1 + ratio + delta", "ratio needs denominator, which delta breaks"),
        ("causal + identity + delta(3)", "a state grows without bound"),
        ("causal + performer_favor(8) + channel_decay", "one scale for all channels|channelwise"),
        ("causal + identity + gate_decay(0)", "temperature must be a number above 0"),
        ("causal + window(4) + delta", "pairs are `full` or `causal`"),
    ],
)
def test_what_does_not_fit_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sc.mechanism(text)
