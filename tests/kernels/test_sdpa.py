"""The sdpa kernel against the definition, and the backend that it names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import saccade as sc
from kernels.harness import agree, answer, draw, gradients, random_mask, same, truth, within_budget
from saccade.cost import Request
from saccade.kernels.sdpa import backend

TEXTS = [
    "full",
    "causal",
    "bilinear",
    "dot(scale=0.3) + causal",
    "rope + causal",
    "standardize",
    "linformer(rank=5, length=64)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "sdpa", lse=False)


@pytest.mark.parametrize("rows", [1, 2, 31, 65, 200])
def test_lengths(rows: int) -> None:
    agree(draw("causal", rows=rows), "sdpa", lse=False)


@pytest.mark.parametrize("value", [8, 5])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("text", ["full", "causal", "bilinear"])
def test_grouped_heads_and_another_value_size(text: str, kv: int, value: int) -> None:
    agree(draw(text, kv=kv, value=value), "sdpa", lse=False)


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 5), (1, 37), (2, 2)])
@pytest.mark.parametrize("text", ["full", "causal", "linformer(rank=4, length=40)"])
def test_queries_and_keys_differ_in_number(text: str, rows: int, keys: int) -> None:
    agree(draw(text, rows=rows, keys=keys), "sdpa", lse=False)


@pytest.mark.parametrize("value", [8, 5])
@pytest.mark.parametrize(
    "text", ["full", "causal", "rope + bilinear + causal", "linformer(rank=4, length=40)"]
)
def test_ragged_padding_never_reaches_a_result(text: str, value: int) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2, value=value), "sdpa", lse=False)


@pytest.mark.parametrize("text", ["full", "causal"])
def test_ragged_keys_for_fewer_queries(text: str) -> None:
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "sdpa", lse=False)


@pytest.mark.parametrize("value", [8, 5])
@pytest.mark.parametrize("text", ["full", "causal"])
def test_a_mask_of_single_pairs(text: str, value: int) -> None:
    call = draw(text, kv=2, value=value)
    call = replace(call, mask=random_mask(call))
    agree(call, "sdpa", lse=False)
    assert not answer(call, "sdpa", False)[0][:, :, 0].any()
    for name, x in gradients(call, lambda c: answer(c, "sdpa", False)).items():
        assert torch.isfinite(x).all(), f"gradient of {name} is not finite"


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("causal")
    agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "sdpa", lse=False)
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "sdpa", False)[0], truth(wide)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["full", "rope + causal"])
def test_low_precision_stays_within_the_twins_budget(text: str, dtype: torch.dtype) -> None:
    within_budget(draw(text, rows=150, kv=2, dim=16, dtype=dtype), "sdpa")


def request(
    device: str, dtype: torch.dtype, *, head_dim: int = 64, value_dim: int = 64, **more: bool
) -> Request:
    return Request(sc.Shape(1, 4, 256, head_dim, value_dim=value_dim), device, dtype, **more)


def test_the_backend_follows_the_shape_class() -> None:
    half, single = torch.bfloat16, torch.float32
    assert backend(request("cpu", single)) == "flash"
    assert backend(request("cpu", single, value_dim=32)) == "math"
    assert backend(request("cuda", half)) == "cudnn"
    assert backend(request("cuda", half, head_dim=256, value_dim=256)) == "flash"
    assert backend(request("cuda", half, masked=True)) == "efficient"
    assert backend(request("cuda", single)) == "efficient"
    assert backend(request("cuda", torch.float64)) == "math"


def test_the_cpu_backend_is_the_one_that_pytorch_runs() -> None:
    for value, op in (
        (16, "_scaled_dot_product_flash_attention_for_cpu"),
        (8, "_scaled_dot_product_attention_math"),
    ):
        call = draw("causal", rows=64, dim=16, value=value, dtype=torch.float32)
        with torch.profiler.profile() as profile:
            answer(call, "sdpa", False)
        assert any(op in e.key for e in profile.key_averages()), op


def test_what_it_refuses_it_explains() -> None:
    for text, words in (
        ("window(3)", "dense length x length mask"),
        ("causal + alibi", "dense bias"),
        ("additive(4)", "no dot product"),
        ("gauss_gate", "changed after the softmax by gauss_gate"),
        ("tiles(8, 8)", "tiles of 8 x 8 were demanded"),
        ("linear", "runs pairwise mechanisms"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="sdpa")
    with pytest.raises(sc.NotSupported, match="gives no lse"):
        sc.plan("full", (1, 4, 64, 16), kernel="sdpa", lse=True)
