"""The chunk kernel against the definition: masks by position under softmax, in tiles, with gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import saccade as sc
from kernels.harness import (
    agree,
    answer,
    draw,
    empty_rows,
    gradients,
    random_mask,
    same,
    truth,
    within_budget,
)

TEXTS = [
    "full",
    "causal",
    "window(5)",
    "window(100)",
    "neighborhood(7)",
    "neighborhood(5, dilation=3)",
    "dilated(3, step=4)",
    "causal + dilated(4, step=2)",
    "strided(5)",
    "chunk(8)",
    "causal + chunk(8)",
    "window(6) + sink(3)",
    "global(2) + window(5)",
    "causal + global(3) + window(4)",
    "(window(9) & strided(2)) | sink(2)",
    "alibi + causal",
    "alibi + neighborhood(9)",
    "alibi + dilated(3, step=3)",
    "rope + window(7)",
    "standardize + causal",
    "bilinear + window(5)",
    "dot(scale=0.3) + causal",
    "linformer(rank=5, length=64)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "chunk")


@pytest.mark.parametrize("rows", [1, 2, 63, 65, 130, 200])
@pytest.mark.parametrize(
    "text", ["window(70)", "dilated(3, step=4)", "neighborhood(5, dilation=3)", "causal"]
)
def test_lengths_that_no_tile_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, heads=2, dim=4), "chunk")


@pytest.mark.parametrize("tiles", ["tiles(16, 32)", "tiles(7, 9)", "tiles(1, 1)", "tiles(500, 500)"])
@pytest.mark.parametrize("text", ["full", "causal + alibi", "window(20) + sink(3)"])
def test_tiles_do_not_change_the_result(text: str, tiles: str) -> None:
    agree(draw(f"{text} + {tiles}", rows=70, heads=2, dim=4), "chunk")


@pytest.mark.parametrize("kv", [32, 64])
def test_more_heads_than_a_cache_holds_at_once(kv: int) -> None:
    agree(draw("window(130)", batch=1, heads=64, kv=kv, rows=260, dim=2), "chunk")


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", ["window(5)", "alibi + dilated(3, step=2)", "causal + tiles(16, 8)"])
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5, rows=41), "chunk")


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 5), (1, 37), (40, 80), (80, 70)])
@pytest.mark.parametrize("text", ["full", "causal", "window(6)", "dilated(3, step=2)", "sink(2) + window(3)"])
def test_queries_and_keys_differ_in_number(text: str, rows: int, keys: int) -> None:
    agree(draw(text, rows=rows, keys=keys, kv=2), "chunk")


@pytest.mark.parametrize(
    "text", ["full", "causal + alibi", "window(6)", "neighborhood(5, dilation=2)", "rope + strided(3)"]
)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "chunk")


@pytest.mark.parametrize("text", ["full", "causal", "window(6)", "sink(2) + window(4)"])
def test_ragged_keys_for_fewer_queries(text: str) -> None:
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "chunk")


@pytest.mark.parametrize(
    "text", ["full", "window(12)", "alibi + causal", "dilated(4, step=2)", "causal + tiles(16, 8)"]
)
def test_a_mask_of_single_pairs(text: str) -> None:
    call = draw(text, kv=2)
    call = replace(call, mask=random_mask(call))
    agree(call, "chunk")
    empty_rows(call, "chunk")


@pytest.mark.parametrize("shape", [(1, 1, 37, 37), (2, 1, 1, 37), (1, 4, 37, 1), (2, 4, 37, 37)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    agree(replace(draw("window(20)"), mask=mask), "chunk")


@pytest.mark.parametrize("text", ["window(9)", "dilated(3, step=4)", "causal"])
def test_strides_of_the_inputs_do_not_matter(text: str) -> None:
    call = draw(text)
    turned = call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    assert not turned.q.is_contiguous()
    agree(turned, "chunk")
    wide = replace(
        call,
        k=call.k[:, :1].expand_as(call.k),
        v=call.v[:1].expand_as(call.v),
        q=call.q[..., :1].expand_as(call.q),
    )
    same("out", answer(wide, "chunk", True)[0], truth(wide)[0])


def test_large_logits_neither_overflow_nor_lose_the_rest() -> None:
    call = draw("causal + tiles(16, 8)", rows=50)
    agree(replace(call, q=call.q * 1e4), "chunk", grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "text", ["window(20)", "causal + alibi", "dilated(8, step=2)", "rope + neighborhood(21)"]
)
def test_low_precision_stays_within_the_twins_budget(text: str, dtype: torch.dtype) -> None:
    within_budget(draw(text, rows=150, kv=2, dim=16, dtype=dtype), "chunk")


def test_backward_keeps_nothing_of_the_length_times_the_window() -> None:
    call = draw("window(16)", rows=256, heads=2).changed(lambda x: x.requires_grad_())
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        answer(call, "chunk", False)
    assert saved
    assert max(saved) <= call.q.numel()


def test_gradients_of_one_input_alone() -> None:
    call = draw("window(5)")
    whole = gradients(call, lambda c: answer(c, "chunk", True))
    k = call.k.clone().requires_grad_()
    out = sc.attend(call.q, k, call.v, call.text, kernel="chunk")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (alone,) = torch.autograd.grad((out * weight).sum(), k)
    same("gradient of k", alone, gradients(call, truth, with_lse=False)["k"])
    assert whole["k"].shape == alone.shape
