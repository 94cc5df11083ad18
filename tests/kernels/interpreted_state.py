"""The Triton kernels of recurrent mechanisms in Triton's interpreter, at small sizes; run by test_state.py in a process of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels import harness
from kernels.harness import Call, agree, answer, gradients, same
from saccade.kernels import delta_run, recurrent, sparse_run, state, state_run
from saccade.kernels.recurrent import Carry
from saccade.kernels.sparse_run import Launch
from saccade.mechanism.values import Recurrent
from saccade.parts.memory import RowRatio
from saccade.parts.pair import Context, map_tokens

if not sparse_run.interpreted():
    pytest.skip("run by test_state.py in a process of its own", allow_module_level=True)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(text: str, **sizes: Any) -> Call:
    """Random inputs whose streams lie around 0."""
    call = harness.draw(text, **sizes)
    return replace(call, streams={n: x * (4 / call.k.shape[2]) - 2 for n, x in call.streams.items()})


SMALL: dict[str, Any] = {"batch": 1, "heads": 1}
TEXTS = [
    "causal + linear",
    "causal + identity",
    "causal + elu1",
    "causal + fixed_decay(first=1.0) + identity",
    "causal + fixed_decay(first=1.0) + elu1 + ratio",
    "gate_decay + causal + identity",
    "causal + gate_decay(temperature=0.5) + elu1 + ratio",
    "gla",
    "causal + channel_decay(temperature=0.5) + elu1 + ratio",
    "mamba2",
    "delta_net",
    "gated_delta_net",
    "causal + fixed_decay(first=1.0) + unit + delta(most=2.0)",
]


def has_lse(text: str) -> bool:
    m = sc.mechanism(text)
    return isinstance(m, Recurrent) and isinstance(m.ratio, RowRatio)


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text, **SMALL), "state", lse=has_lse(text))


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("text", ["causal + linear", "gla", "gated_delta_net"])
def test_one_chunk_and_lengths_that_none_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, batch=1, heads=1), "state", lse=has_lse(text))


@pytest.mark.parametrize(
    "text", ["causal + linear", "causal + gate_decay + identity", "gla", "gated_delta_net"]
)
def test_grouped_heads_padding_and_another_value_size(text: str) -> None:
    agree(draw(text, heads=2, kv=1, value=5, lengths=[37, 20]), "state", lse=has_lse(text))


@pytest.mark.parametrize("text", ["causal + linear", "gla", "delta_net"])
def test_head_sizes_that_are_no_power_of_two(text: str) -> None:
    agree(draw(text, dim=20, value=24, rows=20, batch=1, heads=1), "state", lse=has_lse(text))


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("causal + fixed_decay + elu1", **SMALL)
    agree(
        call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        "state",
        lse=False,
    )


@pytest.mark.parametrize("text", ["causal + gate_decay(temperature=0.1) + identity", "gla(temperature=0.1)"])
def test_strong_decay_stays_finite_and_true(text: str) -> None:
    call = draw(text, **SMALL)
    call = replace(call, streams={n: x - 30 for n, x in call.streams.items()})
    agree(call, "state", lse=False)


def test_equal_keys_lose_nothing() -> None:
    call = draw("causal + unit + delta", rows=40, **SMALL)
    call = replace(
        call,
        k=torch.ones_like(call.k),
        streams={n: torch.full_like(x, 20.0) for n, x in call.streams.items()},
    )
    agree(call, "state", lse=False)


def both(call: Call, carry: Carry, leaves: list[Tensor], run) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Out, the last state and every gradient of both."""
    m = sc.mechanism(call.text)
    assert isinstance(m, Recurrent)
    c = Context(call.q, call.k, call.v, params=call.params, streams=call.streams)
    out, _, after = run(m, map_tokens(m.tokens, c, call.k.shape[2]), carry)
    seen = [out, after.s] + ([after.z] if has_lse(call.text) else [])
    g = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in seen)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return seen + [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found, strict=True)]


@pytest.mark.parametrize(
    ("text", "kv"),
    [
        ("causal + linear", 1),
        ("causal + gate_decay + elu1 + ratio", 2),
        ("gla", 1),
        ("gated_delta_net", 1),
        ("delta_net", 2),
    ],
)
def test_goes_on_from_a_state_and_ends_in_one(text: str, kv: int) -> None:
    call = draw(text, kv=kv, batch=1, heads=2).changed(lambda x: x.requires_grad_())
    g = torch.Generator().manual_seed(1)
    s = torch.randn(1, kv, 8, 8, generator=g, dtype=torch.float64).requires_grad_()
    z = torch.rand(1, kv, 8, generator=g, dtype=torch.float64).requires_grad_(has_lse(text))
    carry = Carry(s, z, torch.full((1, kv), -math.inf, dtype=torch.float64))
    leaves = [*call.learned.values(), s] + ([z] if has_lse(text) else [])
    mine = both(call, carry, leaves, state.chunked)
    for x, y in zip(mine, both(call, carry, leaves, recurrent.chunked), strict=True):
        same(text, x, y)


@pytest.mark.parametrize("text", ["causal + fixed_decay + identity", "gla", "gated_delta_net"])
def test_the_size_of_a_chunk_and_of_a_segment_changes_nothing(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(text, rows=70, batch=1, heads=1)
    first = gradients(call, lambda c: answer(c, "state", False)) | {"out": answer(call, "state", False)[0]}
    for module in (state_run, delta_run):
        monkeypatch.setattr(module, "launch", lambda kind, x: Launch(32, 16, 4, 1))
    monkeypatch.setattr(state_run, "cut", lambda n, stacks, device: state_run.Cut(64, -(-n // 64)))
    other = gradients(call, lambda c: answer(c, "state", False)) | {"out": answer(call, "state", False)[0]}
    for name, x in first.items():
        same(name, other[name], x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    for text in ("causal + linear", "gla", "gated_delta_net"):
        call = draw(text, **SMALL)
        want = answer(call, "state", False)[0]
        low = call.changed(lambda x: x.to(dtype))
        out = answer(low, "state", False)[0]
        assert out.dtype == dtype
        same(text, out, want, tolerance=8 * torch.finfo(dtype).eps)
