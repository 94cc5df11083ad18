"""The gather kernel against the definition: chosen keys of blocks of queries united with a mask by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, agree, answer, draw, gradients, within_budget
from saccade.parts.selection import Blocks

TEXTS = [
    "top_keys(6)",
    "causal + top_keys(6)",
    "causal + top_keys(share(0.2)) + window(5)",
    "top_keys(mass(0.7))",
    "top_blocks(8, top=2)",
    "moba(block=8, top=2)",
    "top_blocks(8, mass(0.6, least=2), rows=8)",
    "causal + top_blocks(8, top=2, rows=8) + chunk(8)",
    "causal + top_blocks(8, above(0.2), rows=4) + sink(3) + window(11)",
    "rope + causal + top_blocks(5, top=2, proxy=bound_key) + window(3)",
    "bilinear + top_blocks(8, top=100, rows=16)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "gather")


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
@pytest.mark.parametrize(
    "text", ["causal + top_keys(6)", "causal + top_blocks(16, top=3, rows=16) + chunk(16)"]
)
def test_lengths_that_no_block_divides(text: str, rows: int) -> None:
    agree(draw(text, rows=rows, dim=4), "gather")


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", ["causal + top_keys(6)", "top_blocks(8, top=2, rows=8)"])
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5), "gather")


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 21), (1, 37)])
@pytest.mark.parametrize(
    "text", ["causal + top_keys(6)", "causal + top_blocks(8, top=2, rows=8) + window(11)"]
)
def test_queries_and_keys_differ_in_number(text: str, rows: int, keys: int) -> None:
    agree(draw(text, rows=rows, keys=keys, kv=2), "gather")


@pytest.mark.parametrize(
    "text", ["causal + top_keys(6)", "causal + top_blocks(8, top=2, rows=8) + window(11)"]
)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "gather")
    agree(draw(text, batch=3, rows=4, keys=30, lengths=[30, 12, 2]), "gather")


def test_a_block_chosen_twice_counts_once() -> None:
    call = draw("top_blocks(8, top=3)")
    index = torch.tensor([1, 1, 3]).expand(2, 4, 37, 3)
    agree(replace(call, selection=Blocks(index, torch.ones_like(index, dtype=torch.bool), 8)), "gather")


def test_an_empty_choice_gives_zeros_and_finite_gradients() -> None:
    call = draw("top_blocks(8, top=2, rows=8)")
    index = torch.zeros(2, 4, 5, 2, dtype=torch.long)
    valid = torch.ones_like(index, dtype=torch.bool)
    valid[:, :, 1] = False
    call = replace(call, selection=Blocks(index, valid, 8, rows=8))
    agree(call, "gather")
    out, lse = answer(call, "gather", True)
    assert lse is not None
    assert not out[:, :, 8:16].any()
    assert torch.isneginf(lse[:, :, 8:16]).all()
    assert all(torch.isfinite(x).all() for x in gradients(call, lambda c: answer(c, "gather", True)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    """The choice is discontinuous, so it is frozen, and the budget is about attention alone."""
    call = draw("causal + top_blocks(8, top=2, rows=8) + chunk(8)", rows=100, dim=16, dtype=dtype)
    chosen = sc.attend(call.q, call.k, call.v, call.text, need=("out", "selection")).selection
    assert isinstance(chosen, Blocks)

    def twin(c: Call) -> tuple[Tensor, None]:
        i = torch.arange(100)
        s = (c.q @ c.k.transpose(-1, -2)) * 0.25
        exist = chosen.exist(slice(0, 100), i, i) | (i[:, None] // 8 == i // 8)
        return torch.softmax(s.masked_fill(~(exist & (i <= i[:, None])), -torch.inf), -1) @ c.v, None

    within_budget(replace(call, selection=chosen), "gather", twin)


def test_all_blocks_are_full_attention() -> None:
    call = draw("top_keys(100)")
    full = sc.attend(call.q, call.k, call.v, "full")
    torch.testing.assert_close(answer(call, "gather", False)[0], full)
