"""The Triton kernels in Triton's interpreter, at small sizes; run by test_sparse.py in a process of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import agree, answer, draw, gradients, same, truth, within_budget
from saccade.kernels import routed, sparse_run
from saccade.kernels.table import Place, table_of
from saccade.parts.mask import Causal, Window
from saccade.parts.selection import Blocks

if not sparse_run.interpreted():
    pytest.skip("run by test_sparse.py in a process of its own", allow_module_level=True)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


ONE = {"batch": 1, "heads": 2}


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "causal",
        "sink(2) + window(9)",
        "causal + document((10, 20))",
        "causal + strided(5)",
        "prefix(20)",
        "rope + causal",
        "bilinear + causal",
    ],
)
def test_masks_by_position(text: str) -> None:
    agree(draw(text, **ONE), "sparse")


def test_several_blocks_whole_and_partial_and_a_length_that_none_divides() -> None:
    agree(draw("causal", rows=150, kv=1, **ONE), "sparse")
    agree(draw("window(70)", rows=131, batch=1, heads=1), "sparse")


@pytest.mark.parametrize(("dim", "value"), [(1, 1), (20, 5), (24, 40)])
def test_head_sizes_that_are_no_power_of_two(dim: int, value: int) -> None:
    agree(draw("causal", dim=dim, value=value, **ONE), "sparse")


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_grouped_heads(kv: int) -> None:
    agree(draw("window(9)", kv=kv, batch=1), "sparse")


@pytest.mark.parametrize(("rows", "keys"), [(20, 37), (37, 21), (1, 1)])
def test_queries_and_keys_differ_in_number(rows: int, keys: int) -> None:
    agree(draw("causal", rows=rows, keys=keys, **ONE), "sparse")


def test_ragged_padding_and_an_empty_sample() -> None:
    agree(draw("causal", batch=3, heads=1, lengths=[37, 20, 0]), "sparse")
    agree(draw("sink(2) + window(9)", batch=2, heads=1, rows=20, keys=40, lengths=[40, 22]), "sparse")


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("causal", **ONE)
    agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "sparse")
    agree(call.changed(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)), "sparse")
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:, :1].expand_as(call.v))
    same("out", answer(wide, "sparse", True)[0], truth(wide)[0])


@pytest.mark.parametrize(
    "text",
    [
        "moba(block=8, top=2)",
        "moba(block=20, top=100)",
        "top_blocks(5, top=2)",
        "causal + top_blocks(8, top=2) + window(11)",
        "bilinear + moba(block=8, top=2)",
    ],
)
def test_chosen_blocks(text: str) -> None:
    agree(draw(text, **ONE), "sparse")


def test_chosen_blocks_with_grouped_heads_padding_and_other_sizes() -> None:
    agree(draw("moba(block=8, top=2)", heads=2, kv=1, lengths=[30, 0], rows=30, value=5), "sparse")
    agree(draw("top_blocks(8, top=2)", heads=1, rows=20, keys=40, lengths=[40, 25]), "sparse")


def test_rows_without_a_block_give_zeros_and_finite_gradients() -> None:
    call = draw("causal + top_blocks(8, top=3)", **ONE)
    out, lse = answer(call, "sparse", True)
    assert lse is not None
    assert not out[:, :, :8].any()
    assert torch.isneginf(lse[:, :, :8]).all()
    assert all(torch.isfinite(x).all() for x in gradients(call, lambda c: answer(c, "sparse", True)).values())


def test_the_choice_is_that_of_the_definition_and_ties_go_to_the_earlier_block() -> None:
    call = draw("moba(block=8, top=2)", **ONE)
    mine = sc.attend(call.q, call.k, call.v, call.text, kernel="sparse")
    same("out", mine, truth(call)[0])
    flat = replace(call, k=torch.ones_like(call.k))
    first = Blocks(torch.zeros(1, 2, 37, 1, dtype=torch.long), torch.ones(1, 2, 37, 1, dtype=torch.bool), 8)
    text = "top_blocks(8, top=1)"
    got = answer(replace(flat, text=text), "sparse", False)[0]
    same("out", got, truth(replace(flat, text=text, selection=first))[0])


def test_a_replayed_choice_of_single_rows_and_of_blocks_of_queries() -> None:
    call = draw("moba(block=8, top=2)", **ONE)
    index = torch.tensor([0, 0, 1]).expand(1, 2, 37, 3).clone()
    past = (torch.arange(37) >= 16).view(1, 1, -1, 1).expand(1, 2, -1, 3)
    agree(replace(call, selection=Blocks(index, past, 8)), "sparse")
    call = draw("causal + top_blocks(64, top=1) + window(5)", rows=140, **ONE)
    index = torch.tensor([[0], [0], [1]]).expand(1, 2, 3, 1)
    agree(replace(call, selection=Blocks(index, index >= 0, 64, 64)), "sparse")


def test_a_replayed_choice_of_a_block_that_does_not_exist_is_refused() -> None:
    call = draw("top_blocks(8, top=1)", **ONE)
    index = torch.full((1, 2, 37, 1), 9)
    chosen = Blocks(index, index > 0, 8)
    with pytest.raises(ValueError, match="37 keys have 5 blocks of 8, 0 to 4"):
        answer(replace(call, selection=chosen), "sparse", False)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize(
    "text", ["moba(block=8, top=2)", "top_blocks(8, top=3)", "causal + top_blocks(40, top=1) + window(11)"]
)
def test_one_token_against_a_cache(text: str, kv: int) -> None:
    agree(draw(text, rows=1, keys=150, kv=kv, batch=2, heads=2), "sparse", grad=False)
    agree(draw(text, rows=3, keys=50, kv=kv, batch=2, heads=2, lengths=[50, 11]), "sparse", grad=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    """The interpreter multiplies the bits of bfloat16, so that is for a GPU."""
    within_budget(draw("window(30)", rows=70, dim=16, dtype=dtype, **ONE), "sparse")


def test_largest_weight_and_mass_of_every_block() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 100, 16, generator=g, dtype=torch.float64) for h in (2, 1, 1))
    table = table_of(Causal() & Window(70), Place(100, 100), 16, 32)
    _, lse = sparse_run.forward(q, k, v, table, 0.25)
    peak, mass = sparse_run.statistics(q, k, lse, table, 0.25)
    i, j = torch.arange(100)[:, None], torch.arange(100)[None]
    s = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~((j <= i) & (j > i - 70)), -torch.inf)
    p = torch.nn.functional.pad(s.softmax(-1), (0, 28, 0, 12)).view(1, 2, 7, 16, 4, 32)
    same("peak", peak, p.amax((3, 5)))
    same("mass", mass, p.sum((3, 5)))
    same("rows", mass.sum(-1)[..., :6], torch.full((1, 2, 6), 16.0, dtype=torch.float64))


def test_what_it_refuses_it_explains() -> None:
    for text, words in (
        ("alibi + causal", "logits part alibi"),
        ("causal + centred_span(3)", "not one choice of blocks"),
        ("additive", "no dot product"),
        ("top_blocks(8) + dilated(3, step=2)", "not cut by one key interval"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="sparse")
    with pytest.raises(sc.NotSupported, match="at most 256"):
        sc.plan("causal", (1, 4, 64, 512), kernel="sparse")
    with pytest.raises(sc.NotSupported, match="mask of single pairs"):
        sc.plan("causal", (1, 4, 64, 16), masked=True, kernel="sparse")


def test_routing_lists_the_slots_of_every_block_in_order() -> None:
    g = torch.Generator().manual_seed(0)
    index = torch.rand(1, 2, 300, 70, generator=g).topk(5, -1).indices.to(torch.int32)
    index[torch.rand(index.shape, generator=g) < 0.2] = -1
    way = routed.route(index.contiguous(), 70, 8)
    for head in range(2):
        for m in range(70):
            start, count = int(way.starts[head, m]), int(way.counts[head, m])
            listed = way.slots[head, start : start + count].tolist()
            assert listed == (index[0, head].flatten() == m).nonzero().flatten().tolist()
