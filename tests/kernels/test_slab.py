"""The slab kernel against the definition: any score, any selection, any reweighting, with all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, agree, answer, draw, empty_rows, random_mask, same, truth, within_budget

TEXTS = [
    "full",
    "causal + alibi",
    "window(5)",
    "additive(6)",
    "causal + additive(3)",
    "bilinear + neighborhood(5)",
    "luong_attention(score=dot)",
    "luong_attention(score=concat, local=monotonic, half=3)",
    "luong_attention(local=predictive, half=4)",
    "causal + centred_span(3)",
    "gauss_gate(5) + causal",
    "moba(block=8, top=2)",
    "top_blocks(8, top=2)",
    "causal + top_blocks(4) + window(7) + sink(2)",
    "linformer(rank=5, length=64)",
    "rope + causal",
    "standardize + dilated(3)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "slab")


@pytest.mark.parametrize("rows", [1, 127, 129, 260])
@pytest.mark.parametrize(
    "text", ["causal + additive(3)", "luong_attention(local=predictive, half=4)", "moba(block=8, top=2)"]
)
def test_lengths_that_no_slab_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, heads=2, dim=4, batch=1), "slab")


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize(
    "text", ["additive(6)", "luong_attention(score=general)", "moba(block=8, top=2)", "gauss_gate(5)"]
)
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5), "slab")


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 5), (1, 37)])
@pytest.mark.parametrize(
    "text",
    [
        "additive(6)",
        "causal + bilinear",
        "moba(block=8, top=1)",
        "gauss_gate(5)",
        "linformer(rank=4, length=40)",
    ],
)
def test_queries_and_keys_differ_in_number(text: str, rows: int, keys: int) -> None:
    agree(draw(text, rows=rows, keys=keys), "slab")


@pytest.mark.parametrize(
    "text",
    [
        "additive(6)",
        "causal + bilinear",
        "moba(block=8, top=2)",
        "top_blocks(8, top=2)",
        "gauss_gate(5)",
        "linformer(rank=4, length=40)",
    ],
)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "slab")


@pytest.mark.parametrize("text", ["additive(6)", "causal + bilinear", "moba(block=8, top=2)"])
def test_ragged_keys_for_fewer_queries(text: str) -> None:
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "slab")


@pytest.mark.parametrize(
    "text", ["additive(6)", "window(12)", "causal + gauss_gate(9)", "moba(block=8, top=2)"]
)
def test_a_mask_of_single_pairs(text: str) -> None:
    call = draw(text, kv=2)
    call = replace(call, mask=random_mask(call))
    agree(call, "slab")
    empty_rows(call, "slab")


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("causal + additive(5)")
    agree(call.changed(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), "slab")
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "slab", True)[0], truth(wide)[0])


def test_a_replayed_selection_is_followed() -> None:
    call = draw("moba(block=8, top=2)")
    other = draw("moba(block=8, top=2)", seed=5)
    chosen = sc.attend(other.q, other.k, other.v, other.text, need=("out", "selection")).selection
    frozen = replace(call, selection=chosen)
    agree(frozen, "slab")
    assert not torch.allclose(truth(frozen)[0], truth(call)[0])


def naive_additive(call: Call) -> tuple[Tensor, None]:
    """v.tanh(Wq q + Wk k), softmax over the causal prefix, whole and in the call's own precision."""
    q, k = call.q @ call.params["additive_q"], call.k @ call.params["additive_k"]
    hidden = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2))
    s = torch.einsum("bhqka,ha->bhqk", hidden, call.params["additive_v"])
    below = torch.ones(s.shape[2], s.shape[3], dtype=torch.bool).tril()
    return torch.softmax(s.masked_fill(~below, -torch.inf), -1) @ call.v, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    within_budget(draw("causal + additive(8)", rows=150, dim=16, dtype=dtype), "slab", naive_additive)
    within_budget(draw("causal + alibi", rows=150, kv=2, dim=16, dtype=dtype), "slab")


def test_no_buffer_of_length_times_length() -> None:
    call = draw("causal + additive(2)", rows=300, heads=1, dim=4, batch=1).changed(
        lambda x: x.requires_grad_()
    )
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        answer(call, "slab", False)
    assert saved
    assert max(saved) <= call.q.numel()
