"""Sequences side by side equal each sequence alone, whatever the mechanism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.mechanism import draw_named
from saccade.parts.base import Sizes

LENGTHS = [5, 1, 0, 12, 11, 12, 3]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
MECHANISMS = [
    "causal",
    "full + rope",
    "window(3) + alibi",
    "causal + entmax(1.5)",
    "moba(4, top=1)",
    "linear",
    "retention",
    "gla",
    "gated_delta_net",
    "mamba2",
    "causal + performer_favor(16)",
]


def inputs(text: str, seed: int = 0) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    n = int(ENDS[-1])
    q = torch.randn(1, 4, n, 8, generator=generator)
    k, v = (torch.randn(1, 2, n, 8, generator=generator) for _ in range(2))
    named = draw_named(sc.mechanism(text), Sizes(4, 2, 8, 8), 1, n, generator)
    return [q, k, v], named


def alone(x: Tensor, n: int) -> Tensor:
    return x[:, :, int(ENDS[n]) : int(ENDS[n + 1])]


each = pytest.mark.parametrize("text", MECHANISMS)


@each
def test_equals_each_sequence_alone(text: str) -> None:
    qkv, named = inputs(text)
    for x in qkv:
        x.requires_grad_()
    got = sc.attend_ragged(*qkv, text, ENDS, **named).out
    apart = []
    for n in range(len(LENGTHS)):
        own = named | {"streams": {name: alone(x, n) for name, x in named["streams"].items()}}
        apart.append(sc.attend(*(alone(x, n) for x in qkv), text, **own))
    want = torch.cat(apart, 2)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((x * seed).sum(), qkv, allow_unused=True) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["causal", "causal + linear", "retention", "gated_delta_net"])
def test_states_go_on(text: str) -> None:
    """Two ragged calls equal one over the joined sequences; an empty sequence leaves its state as it was."""
    qkv, named = inputs(text)
    first = sc.attend_ragged(*qkv, text, ENDS, need=("out", "state"), **named)
    assert first.states is not None
    assert [s.length for s in first.states] == LENGTHS
    more, others = inputs(text, seed=3)
    second = sc.attend_ragged(*more, text, ENDS, states=first.states, need=("state",), **others)
    assert second.states is not None
    for n in range(len(LENGTHS)):
        both = [torch.cat((alone(a, n), alone(b, n)), 2) for a, b in zip(qkv, more, strict=True)]
        streams = {
            name: torch.cat((alone(x, n), alone(others["streams"][name], n)), 2)
            for name, x in named["streams"].items()
        }
        want = sc.attend(*both, text, need=("state",), **(named | {"streams": streams}))
        torch.testing.assert_close(alone(second.out, n), want.out[:, :, LENGTHS[n] :], atol=2e-5, rtol=2e-5)
        assert second.states[n].length == 2 * LENGTHS[n]
        assert want.state is not None
        for name, x in want.state.tensors.items():
            torch.testing.assert_close(second.states[n].tensors[name], x, atol=2e-5, rtol=2e-5)


def test_lse_comes_along() -> None:
    qkv, _ = inputs("causal")
    got = sc.attend_ragged(*qkv, "causal", ENDS, need=("lse",)).lse
    want = [sc.attend(*(alone(x, n) for x in qkv), "causal", need=("lse",)).lse for n in range(len(LENGTHS))]
    assert got is not None
    torch.testing.assert_close(got, torch.cat([x for x in want if x is not None], 2))


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (torch.tensor([0, 5]), ValueError),
        (torch.tensor([1, 44]), ValueError),
        (torch.tensor([0, 9, 4, 44]), ValueError),
        (torch.tensor([0.0, 44.0]), TypeError),
        ([0, 44], TypeError),
    ],
)
def test_bad_ends_are_refused(ends: Tensor, error: type[Exception]) -> None:
    qkv, _ = inputs("causal")
    with pytest.raises(error, match="cu_seqlens"):
        sc.attend_ragged(*qkv, "causal", ends)


def test_bad_calls_are_refused() -> None:
    (q, k, v), _ = inputs("causal")
    with pytest.raises(ValueError, match="batch of one"):
        sc.attend_ragged(q.expand(2, -1, -1, -1), k, v, "causal", ENDS)
    with pytest.raises(sc.NotSupported, match="weights"):
        sc.attend_ragged(q, k, v, "causal", ENDS, need=("weights",))
    with pytest.raises(ValueError, match="7 states"):
        sc.attend_ragged(q, k, v, "causal", ENDS, states=[])
