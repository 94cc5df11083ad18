"""The block kernel against the definition: chosen key blocks united with a mask by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import agree, answer, draw, gradients, naive, same, truth, within_budget
from saccade.parts.selection import Blocks

TEXTS = [
    "moba(block=8, top=2)",
    "moba(block=5, top=3)",
    "moba(block=8, top=100)",
    "moba(block=64, top=2)",
    "top_blocks(8, top=2)",
    "top_blocks(5, top=2)",
    "causal + top_blocks(8, top=3)",
    "causal + top_blocks(8, top=2) + window(11)",
    "causal + top_blocks(8, top=2) + sink(3) + window(4)",
    "top_blocks(8, top=2) + neighborhood(9)",
    "rope + moba(block=8, top=2)",
    "bilinear + moba(block=8, top=2)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "block")


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 150])
@pytest.mark.parametrize("text", ["moba(block=8, top=2)", "top_blocks(16, top=3)"])
def test_lengths_that_no_block_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, dim=4), "block")


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", ["moba(block=8, top=2)", "top_blocks(8, top=2)"])
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5), "block")


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 21), (1, 37)])
@pytest.mark.parametrize(
    "text", ["moba(block=8, top=2)", "top_blocks(8, top=2)", "causal + top_blocks(8, top=3) + window(11)"]
)
def test_queries_and_keys_differ_in_number(text: str, rows: int, keys: int) -> None:
    agree(draw(text, rows=rows, keys=keys, kv=2), "block")


@pytest.mark.parametrize(
    "text", ["moba(block=8, top=2)", "top_blocks(8, top=2)", "causal + top_blocks(8, top=3) + window(11)"]
)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "block")
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "block")


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("moba(block=8, top=2)")
    agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "block")
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "block", True)[0], truth(wide)[0])


def test_rows_without_a_block_give_zeros_and_finite_gradients() -> None:
    call = draw("causal + top_blocks(8, top=3)")
    out, lse = answer(call, "block", True)
    assert lse is not None
    assert not out[:, :, :8].any()
    assert torch.isneginf(lse[:, :, :8]).all()
    assert not torch.isinf(lse[:, :, 8:]).any()
    assert all(torch.isfinite(x).all() for x in gradients(call, lambda c: answer(c, "block", True)).values())


def test_a_replayed_selection_is_followed() -> None:
    call = draw("moba(block=8, top=2)")
    index = torch.zeros(2, 4, 37, 1, dtype=torch.long)
    past = (torch.arange(37) >= 8).view(1, 1, -1, 1).expand(2, 4, -1, -1)
    agree(replace(call, selection=Blocks(index, past, 8)), "block")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    """The choice is discontinuous, so it is frozen, and the budget is about attention alone."""
    call = draw("causal + top_blocks(16, top=3) + chunk(16)", rows=150, kv=2, dim=16, dtype=dtype)
    chosen = sc.attend(call.q, call.k, call.v, call.text, need=("out", "selection")).selection
    assert isinstance(chosen, Blocks)

    def twin(c) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        i = torch.arange(150)
        k, v = (x.repeat_interleave(2, dim=1) for x in (c.k, c.v))
        s = (c.q @ k.transpose(-1, -2)) * 0.25
        exist = chosen.exist(slice(None), i, i) | (i[:, None] // 16 == i // 16)
        s = s.masked_fill(~(exist & (i <= i[:, None])), -torch.inf)
        return torch.softmax(s, -1) @ v, None

    within_budget(replace(call, selection=chosen), "block", twin)


def test_all_blocks_is_full_causal_attention() -> None:
    call = draw("moba(block=8, top=5)", rows=40)
    same("out", answer(call, "block", False)[0], naive(replace(call, text="causal"))[0])


def test_what_it_refuses_it_explains() -> None:
    for text, words in (
        ("window(3)", "not one choice of blocks"),
        ("alibi + moba", "logits part alibi"),
        ("additive + moba", "no dot product"),
        ("causal + centred_span(3)", "not one choice of blocks"),
        ("top_blocks(8) + top_blocks(16)", "not one choice of blocks"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="block")
    with pytest.raises(sc.NotSupported, match="a mask of single pairs"):
        sc.plan("moba", (1, 4, 64, 16), kernel="block", masked=True)
