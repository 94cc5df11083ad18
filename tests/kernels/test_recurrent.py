"""The recurrent kernel against the definition: three forms (parallel, chunked, one step) that must agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, agree, answer, draw, gradients, same, truth, within_budget
from saccade import reference
from saccade.kernels import recurrent
from saccade.kernels.recurrent import Carry, bidirectional, chunked, step
from saccade.mechanism.values import Recurrent
from saccade.parts.memory import RowRatio
from saccade.parts.pair import map_tokens

CAUSAL = [
    "causal + linear",
    "causal + identity",
    "causal + elu1",
    "causal + performer_favor(12)",
    "causal + fixed_decay + identity",
    "causal + fixed_decay(first=1.0) + elu1 + ratio",
    "causal + fixed_decay(first=1.0) + performer_favor(12)",
    "causal + rope + identity",
    "causal + standardize + linear",
]
BOTH_WAYS = [
    "linear",
    "identity",
    "performer_favor(12)",
    "efficient_attention",
    "efficient_attention(normalizer=scaling)",
    "elu1 + channel_ratio",
    "standardize + linear",
]


def has_lse(text: str) -> bool:
    m = sc.mechanism(text)
    return isinstance(m, Recurrent) and isinstance(m.ratio, RowRatio)


@pytest.mark.parametrize("text", CAUSAL + BOTH_WAYS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "recurrent", lse=has_lse(text))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("text", ["causal + linear", "causal + fixed_decay(first=1.0) + performer_favor(12)"])
def test_lengths_that_no_chunk_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, heads=2, dim=4, batch=1), "recurrent")


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        "causal + linear",
        "causal + fixed_decay + performer_favor(12)",
        "linear",
        "performer_favor(12)",
        "efficient_attention",
    ],
)
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5), "recurrent", lse=has_lse(text))


@pytest.mark.parametrize("text", BOTH_WAYS)
def test_queries_and_keys_differ_in_number(text: str) -> None:
    for rows, keys in ((5, 37), (37, 5), (1, 37)):
        agree(draw(text, rows=rows, keys=keys), "recurrent", lse=has_lse(text))


@pytest.mark.parametrize("text", CAUSAL + BOTH_WAYS)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "recurrent", lse=has_lse(text))


@pytest.mark.parametrize("text", ["linear", "performer_favor(12)", "efficient_attention"])
def test_ragged_keys_for_fewer_queries(text: str) -> None:
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "recurrent", lse=has_lse(text))


@pytest.mark.parametrize("text", ["causal + linear", "performer_favor(12)"])
def test_a_sample_without_keys_gives_zeros_and_finite_gradients(text: str) -> None:
    call = draw(text, lengths=[37, 0])
    out, lse = answer(call, "recurrent", True)
    assert lse is not None
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()
    found = gradients(call, lambda c: answer(c, "recurrent", True))
    assert all(torch.isfinite(x).all() for x in found.values())


def test_strides_of_the_inputs_do_not_matter() -> None:
    for text in ("causal + linear", "performer_favor(12)"):
        call = draw(text)
        agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "recurrent")
        wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
        same("out", answer(wide, "recurrent", True)[0], truth(wide)[0])


@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunk_length_does_not_change_the_result(
    text: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(text, kv=2)
    m = sc.mechanism(text)
    assert isinstance(m, Recurrent)
    c = reference.context(call.q, call.k, call.v, buffers=call.buffers)
    c = map_tokens(m.tokens, c, 37)
    whole, _, same_after = chunked(m, c)
    monkeypatch.setattr(recurrent, "chunk_length", lambda m, device: chunk)
    out, _, after = chunked(m, c)
    same("out", out, whole)
    if chunk == 1:
        size = m.feature.size(8)
        carry = Carry.empty(2, 2, size, 8, call.v)
        rows = []
        for t in range(37):
            one = replace(c, q=c.q[:, :, t : t + 1], k=c.k[:, :, t : t + 1], v=c.v[:, :, t : t + 1])
            row, carry = step(m, one, carry)
            rows.append(row)
        same("steps", torch.cat(rows, 2), whole)
        same("state", carry.s, after.s)
        same("state", after.s, same_after.s)
        same("norm", carry.z, after.z)


@pytest.mark.parametrize("text", ["causal + performer_favor(12)", "performer_favor(12)"])
def test_large_keys_keep_exponential_features_finite(text: str) -> None:
    call = draw(text)
    for factor in (30.0, 100.0):
        large = replace(call, q=call.q * factor, k=call.k * factor)
        agree(large, "recurrent", grad=False)
        low = replace(large.changed(Tensor.float), buffers={n: b.float() for n, b in call.buffers.items()})
        assert torch.isfinite(answer(low, "recurrent", False)[0]).all()


def twin(call: Call) -> tuple[Tensor, None]:
    """The parallel form with elu(x) + 1, whole and in the call's own precision."""
    phi_q, phi_k = torch.nn.functional.elu(call.q) + 1, torch.nn.functional.elu(call.k) + 1
    w = phi_q @ phi_k.transpose(-1, -2)
    if sc.mechanism(call.text).causal:
        w = w.tril()
    return (w @ call.v) / w.sum(-1, keepdim=True), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["causal + linear", "linear"])
def test_low_precision_stays_within_the_twins_budget(text: str, dtype: torch.dtype) -> None:
    within_budget(draw(text, rows=300, heads=2, dim=16, dtype=dtype), "recurrent", twin)


def test_bidirectional_padding_is_left_out_of_sums() -> None:
    m = sc.mechanism("linear")
    assert isinstance(m, Recurrent)
    call = draw("linear", lengths=[37, 11]).poisoned()
    c = reference.context(call.q, call.k, call.v, key_lengths=call.lengths)
    alone = reference.context(call.q[1:, :, :11], call.k[1:, :, :11], call.v[1:, :, :11])
    same("out", bidirectional(m, c)[0][1:, :, :11], bidirectional(m, alone)[0])


def test_what_it_refuses_it_explains() -> None:
    for text, shape, more, words in (
        ("causal", (1, 4, 64, 16), {}, "this one is pairwise"),
        ("causal + linear", (1, 4, 64, 16), {"masked": True}, "use key_lengths for padding"),
        ("causal + identity", (1, 4, 64, 16), {"lse": True}, "no row denominator"),
        ("causal + linear", sc.Shape(1, 4, 3, 16, keys=64), {}, "as many queries as keys"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, shape, kernel="recurrent", **more)
