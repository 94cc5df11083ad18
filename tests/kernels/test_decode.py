"""The decode kernel against the definition: a few rows after a cache, grouped heads folded into rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import saccade as sc
from kernels.harness import agree, answer, draw, random_mask, same, truth, within_budget

TEXTS = [
    "full",
    "causal",
    "window(5)",
    "sink(2) + window(6)",
    "alibi + causal",
    "dilated(3, step=4)",
    "rope + causal",
    "bilinear",
    "linformer(rank=4, length=64)",
    "causal + chunk(8)",
]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, keys=37), "decode", grad=False)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("value", [8, 5])
def test_grouped_heads_and_another_value_size(kv: int, value: int) -> None:
    agree(draw("causal", rows=3, keys=37, kv=kv, value=value), "decode", grad=False)


def test_one_row_and_one_key() -> None:
    agree(draw("causal", rows=1), "decode", grad=False)


@pytest.mark.parametrize("text", ["full", "causal", "window(5)", "linformer(rank=4, length=64)"])
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2], kv=2), "decode", grad=False)


def test_a_mask_of_single_pairs() -> None:
    call = draw("window(20)", rows=3, keys=37, kv=2)
    call = replace(call, mask=random_mask(call))
    agree(call, "decode", grad=False)
    out, lse = answer(call, "decode", True)
    assert lse is not None
    assert not out[:, :, 0].any()
    assert torch.isneginf(lse[:, :, 0]).all()


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("causal", rows=2, keys=37, kv=2)
    agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "decode", grad=False)
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "decode", True)[0], truth(wide)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["causal", "rope + alibi + window(40)"])
def test_low_precision_stays_within_the_twins_budget(text: str, dtype: torch.dtype) -> None:
    within_budget(draw(text, rows=1, keys=150, kv=2, dim=16, dtype=dtype), "decode", grad=False)


def test_keys_are_neither_expanded_nor_copied() -> None:
    call = draw("causal", rows=1, keys=512, heads=8, kv=1, dim=16, batch=1, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        answer(call, "decode", False)
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert largest < call.k.numel() * 4


def test_what_it_refuses_it_explains() -> None:
    cache = sc.Shape(1, 4, 1, 16, keys=64)
    for text, shape, more, words in (
        ("moba", cache, {}, "chosen by content"),
        ("causal", sc.Shape(1, 4, 17, 16, keys=64), {}, "at most 16 query rows, here are 17"),
        ("causal", sc.Shape(1, 4, 8, 16), {}, "queries that follow a cache"),
        ("causal", cache, {"grad": True}, "no gradients"),
        ("tiles(8, 8)", cache, {}, "were demanded"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, shape, kernel="decode", **more)
