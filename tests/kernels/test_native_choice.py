"""Chosen blocks in the native engine: its own choice, masks beside it, repeated and empty choices, rows that share one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import answer, draw, gradients, same, truth, within_budget
from kernels.test_native import close
from saccade import native
from saccade.kernels import native_choice
from saccade.parts.pair import Context
from saccade.parts.select import TopBlocks
from saccade.parts.selection import Blocks

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native engine {native.reason()}")

TEXTS = [
    "moba(block=16, top=3)",
    "moba(block=7, top=2)",
    "top_blocks(16, top=3)",
    "top_blocks(16, top=3) + window(5)",
    "causal + top_blocks(16, top=3) + window(25) + sink(2)",
    "top_blocks(130, top=1) + chunk(9)",
]


def random_blocks(shape: tuple[int, ...], blocks: int, size: int, rows: int = 1) -> Blocks:
    """Any blocks at all: repeated, in any order, some invalid."""
    g = torch.Generator().manual_seed(5)
    index = torch.randint(blocks, shape, generator=g)
    return Blocks(index, torch.rand(shape, generator=g) < 0.8, size, rows)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (37, 37), (130, 130), (40, 90)])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition_on_its_choice(text: str, rows: int, keys: int) -> None:
    call = draw(text, rows=rows, keys=keys, kv=2, value=5, dtype=torch.float32)
    chosen = sc.attend(call.q, call.k, call.v, text, need=("selection",)).selection
    close(replace(call, selection=chosen))


@pytest.mark.parametrize("lengths", [[70, 33], [0, 70]])
def test_padding_is_never_read(lengths: list[int]) -> None:
    for text in TEXTS:
        call = draw(text, rows=70, lengths=lengths, dtype=torch.float32)
        clean = [torch.nan_to_num(x) for x in (call.q, call.k, call.v)]
        chosen = sc.attend(*clean, text, key_lengths=call.lengths, need=("selection",)).selection
        close(replace(call, selection=chosen))


@pytest.mark.parametrize("size", [1, 8, 100])
@pytest.mark.parametrize(
    "text", ["moba(block=8)", "causal + top_blocks(8) + window(20) + sink(3)", "top_blocks(8)"]
)
def test_any_choice_counts_each_pair_once(text: str, size: int) -> None:
    call = draw(text, rows=90, dtype=torch.float32)
    shape = (2, 4, 90, 12)
    close(replace(call, selection=random_blocks(shape, -(-90 // size), size)))


@pytest.mark.parametrize("rows", [4, 16, 100])
def test_rows_may_share_a_choice(rows: int) -> None:
    call = draw("causal + top_blocks(8) + window(3)", rows=90, dtype=torch.float32)
    close(replace(call, selection=random_blocks((2, 4, -(-90 // rows), 5), 12, 8, rows)))


def test_an_empty_choice_leaves_zeros() -> None:
    call = draw("top_blocks(8, top=2)", rows=30, dtype=torch.float32)
    none = random_blocks((2, 4, 30, 2), 4, 8)
    call = replace(call, selection=replace(none, valid=torch.zeros_like(none.valid)))
    out, lse = answer(call, "native", True)
    assert lse is not None
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert all(not x.any() for x in gradients(call, lambda c: answer(c, "native", True)).values())


@pytest.mark.parametrize("text", TEXTS)
def test_bfloat16_stays_in_its_budget(text: str) -> None:
    call = draw(text, rows=101, heads=2, dim=32, dtype=torch.bfloat16)
    chosen = sc.attend(call.q, call.k, call.v, text, need=("selection",)).selection

    def twin(c: object) -> tuple[Tensor, Tensor | None]:
        assert isinstance(c, type(call))
        return answer(c, "slab", False)

    within_budget(replace(call, selection=chosen), "native", twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(("rows", "keys", "kv"), [(1, 1, 4), (70, 70, 2), (300, 300, 1), (20, 130, 4)])
def test_its_choice_is_that_of_the_part(
    dtype: torch.dtype, past: bool, rows: int, keys: int, kv: int
) -> None:
    call = draw("causal", rows=rows, keys=keys, kv=kv, dim=20, dtype=dtype)
    for top in (1, 3, 9):
        select = TopBlocks(8, top)
        for ends in (None, torch.tensor([keys, max(1, keys - 9)])):
            c = Context(
                call.q, call.k, call.v, keys - rows if ends is None else None, ends=ends, looks_back=past
            )
            got, want = native_choice.choose(select, c), select.choose(c)
            assert got.index.shape == want.index.shape
            for a, b in ((got, want), (want, got)):
                picked = a.index.masked_fill(~a.valid, -1).sort(-1).values
                assert torch.equal(picked, b.index.masked_fill(~b.valid, -1).sort(-1).values)


def test_ties_go_to_the_first_block() -> None:
    q, k = torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4)
    found = native_choice.choose(TopBlocks(4, 3), Context(q, k, k, looks_back=True))
    assert found.index[0, 0, 39].tolist() == [0, 1, 2]
    assert found.index[0, 0, 9].tolist()[:2] == [0, 1]
    assert found.valid[0, 0, 9].tolist() == [True, True, False]


def test_threads_repeat_a_choice_bit_by_bit() -> None:
    call = draw("moba(block=16, top=3)", batch=1, heads=3, kv=1, rows=200, dtype=torch.float32)
    torch.set_num_threads(3)
    try:
        first, again = (gradients(call, lambda c: answer(c, "native", True)) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    want = truth(call.changed(Tensor.double))[0]
    same("out", answer(call, "native", False)[0], want, tolerance=1e-5)


def test_a_mask_beside_the_choice_that_is_no_interval_is_refused() -> None:
    with pytest.raises(sc.NotSupported, match="beside its choice are no intervals"):
        sc.plan("causal + top_blocks(8) + strided(3)", (1, 1, 64, 4), kernel="native")


@pytest.mark.parametrize("lengths", [None, [90, 41]])
@pytest.mark.parametrize(
    "text",
    [
        "seerattention(8, top=3, width=10)",
        "seerattention(8, top=3, width=6, rope=false)",
        "causal + top_blocks(8, top=3, proxy=bound_key) + chunk(8)",
        "top_blocks(8, top=3, proxy=bound_key)",
    ],
)
def test_any_product_of_vectors_is_scored_and_sorted_in_the_engine(
    text: str, lengths: list[int] | None
) -> None:
    m = sc.mechanism(text)
    call = draw(text, rows=90, kv=2, lengths=lengths, dtype=torch.float32)
    (select,) = (p for p in m.pairs.leaves() if isinstance(p, TopBlocks))
    q, k = (torch.nan_to_num(x) for x in (call.q, call.k))
    c = Context(q, k, k, None if lengths else 0, ends=call.lengths, params=call.params, looks_back=m.causal)
    got, wanted = native_choice.choose(select, c), select.choose(c)
    picked = [x.index.masked_fill(~x.valid, -1).sort(-1).values for x in (got, wanted)]
    assert torch.equal(*picked)
