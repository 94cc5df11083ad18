"""The native engine against the definition: masks by position in float32 and bfloat16, every instruction set, tails, strides, threads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, answer, draw, gradients, same, truth, within_budget
from saccade import native
from saccade.kernels import native as kernel
from saccade.kernels.native_table import CACHE_BYTES, Intervals, Listed, table
from saccade.parts.algebra import cover, static_exist
from saccade.parts.interval import intervals
from saccade.plan.choose import make

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native engine {native.reason()}")

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
    "window(6) + strided(7)",
    "window(6) + strided(7) + dilated(5, step=3) + sink(2)",
    "prefix(9)",
    "document((5, 9, 70))",
    "causal + document((5, 9, 70))",
    "permuted(9, length=50)",
    "causal + permuted(9, length=50)",
    "powerattention(block=8)",
    "powerattention(block=8, local=2, sinks=1)",
    "every(3)",
    "local_blocks(16, last=2)",
    "rope + window(7)",
    "bilinear + window(5)",
    "dot(scale=0.3) + causal",
    "gqa(2) + causal + sink_logit",
]
GRIDS = [
    ("na(3)", (6, 9)),
    ("na((5, 7), dilation=2)", (12, 20)),
    ("na((4, 5), stride=(4, 2), border=drop)", (8, 24)),
    ("na((3, 5, 3), causal_axes=(true, false, false))", (6, 7, 5)),
    ("na((9,), stride=3)", (40,)),
    ("na((8, 16), stride=(8, 16))", (16, 32)),
    ("halonet(4, halo=2)", (10, 13)),
    ("halonet(3, halo=1, axes=3)", (4, 6, 5)),
    ("halonet(4, halo=9)", (6, 9)),
    ("na(5) + rel_axes(2)", (9, 12)),
    ("na((4, 5), stride=(2, 3), causal_axes=(true, false)) + rel_axes(6)", (9, 12)),
    ("na(3, dilation=2) + rel_axes(3)", (9, 12)),
    ("rel_axes(3)", (7, 10)),
    ("causal + rel_axes(2, axes=1)", (70,)),
]
SINGLE, ROUNDED = 1e-5, 2e-2


def close(call: Call, *, grad: bool = True, tolerance: float = SINGLE) -> None:
    """The engine answers, from float32 inputs, what the definition answers in float64; padding holds NaN."""
    wide = call.changed(Tensor.double)
    dirty = call.poisoned() if call.lengths is not None else call
    want, want_lse = truth(wide)
    got, got_lse = answer(dirty, "native", True)
    assert want_lse is not None
    assert got_lse is not None
    same("out", got, want, call.row_valid, tolerance)
    same("lse", got_lse, want_lse, call.row_valid.squeeze(-1), tolerance)
    if not grad:
        return
    expected = gradients(wide, truth)
    found = gradients(replace(dirty, q=call.q), lambda c: answer(c, "native", True))
    for name, x in expected.items():
        where = call.row_valid if name == "q" else call.key_valid if name in ("k", "v") else None
        same(f"gradient of {name}", found[name], x, where, tolerance)


@pytest.fixture(params=range(4), ids=native.ISA)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each instruction set that this machine has, forced."""
    if request.param > native.ISA.index(native.isa()):
        pytest.skip(f"this machine has no {native.ISA[request.param]}")
    monkeypatch.setattr(kernel, "BEST", request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 37, 130])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str, rows: int) -> None:
    close(draw(text, rows=rows, dtype=torch.float32))


@pytest.mark.parametrize(("text", "grid"), GRIDS)
def test_grids(text: str, grid: tuple[int, ...]) -> None:
    m = sc.mechanism(text).on_grid(grid)
    call = draw(str(m), rows=math.prod(grid), kv=2, dtype=torch.float32)
    close(call)


@pytest.mark.parametrize("text", ["causal", "window(40) + sink(3)", "window(6) + strided(7)"])
@pytest.mark.parametrize(
    ("dim", "value"), [(1, 1), (5, 3), (16, 33), (64, 64), (80, 100), (256, 256), (33, 256)]
)
def test_every_instruction_set_and_size(isa: int, text: str, dim: int, value: int) -> None:
    close(draw(text, rows=101, kv=2, dim=dim, value=value, dtype=torch.float32))


@pytest.mark.parametrize(("dim", "value"), [(5, 3), (16, 33), (64, 64)])
def test_terms_that_rows_hold_in_every_instruction_set(isa: int, dim: int, value: int) -> None:
    m = sc.mechanism("halonet(4, halo=2)").on_grid((9, 14))
    close(draw(str(m), rows=126, kv=2, dim=dim, value=value, dtype=torch.float32))
    half = draw(str(m), rows=126, kv=2, dim=dim, value=value, dtype=torch.bfloat16)
    close(half, tolerance=ROUNDED)


def test_terms_are_left_to_others_where_rows_meet_several_parts_or_lengths_differ() -> None:
    for text, lengths, why in (
        ("(window(6) | strided(7)) + rel_axes(2, axes=1)", None, "are for one part"),
        ("rel_axes(2, axes=1) + softcap(5.0)", None, "rel_axes is not followed"),
        ("rel_axes(2, axes=1)", [64, 9], "for whole sequences of one length"),
        ("rel_axes(2, axes=1, grid=(300,))", None, "rel_axes is not followed"),
    ):
        m = sc.mechanism(text) if "grid" in text else sc.mechanism(text).on_grid((64,))
        call = draw(str(m), rows=300 if "grid" in text else 64, lengths=lengths, dtype=torch.float32)
        with pytest.raises(sc.NotSupported, match=why):
            answer(call, "native", True)


@pytest.mark.parametrize("text", ["causal", "window(40) + sink(3)", "window(6) + strided(7)"])
@pytest.mark.parametrize(("dim", "value"), [(5, 3), (16, 34), (64, 64), (128, 96)])
def test_bfloat16_stays_in_its_budget(isa: int, text: str, dim: int, value: int) -> None:
    within_budget(draw(text, rows=101, heads=2, dim=dim, value=value, dtype=torch.bfloat16), "native")


def test_lse_of_bfloat16_is_float32() -> None:
    call = draw("causal", rows=70, dim=16, dtype=torch.bfloat16)
    _, lse = answer(call, "native", True)
    assert lse is not None
    assert lse.dtype == torch.float32
    want = truth(call.changed(Tensor.double))[1]
    assert want is not None
    same("lse", lse, want, tolerance=1e-5)


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 128, 193, 300])
@pytest.mark.parametrize("text", ["causal", "window(70)", "dilated(3, step=4)", "full"])
def test_lengths_that_no_tile_divides(text: str, rows: int) -> None:
    close(draw(text, rows=rows, heads=2, dim=4, dtype=torch.float32))


@pytest.mark.parametrize(("rows", "keys"), [(5, 37), (37, 5), (1, 37), (40, 80), (80, 70), (3, 900)])
@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", ["full", "causal", "window(30) + sink(2)", "prefix(9)", "strided(3)"])
def test_other_numbers_of_queries_than_keys(text: str, rows: int, keys: int, kv: int) -> None:
    close(draw(text, rows=rows, keys=keys, kv=kv, value=5, dtype=torch.float32))


@pytest.mark.parametrize("lengths", [[37, 37], [0, 5], [1, 36]])
@pytest.mark.parametrize("text", ["full", "causal", "window(5)", "window(6) + sink(3)", "neighborhood(7)"])
@pytest.mark.parametrize("keys", [37, 50])
def test_padding_is_never_read(text: str, lengths: list[int], keys: int) -> None:
    close(draw(text, rows=37, keys=keys, lengths=lengths, dtype=torch.float32))


def test_a_row_without_keys_is_zero_and_has_no_level() -> None:
    call = draw("(window(3) & dilated(4, step=2)) & sink(2)", rows=70, dtype=torch.float32)
    out, lse = answer(replace(call, text="causal & window(3) & sink(2)"), "native", True)
    assert lse is not None
    assert not out[:, :, 5:].any()
    assert torch.isneginf(lse[:, :, 5:]).all()
    for x in gradients(
        replace(call, text="causal & window(3) & sink(2)"), lambda c: answer(c, "native", True)
    ).values():
        assert torch.isfinite(x).all()


def test_inputs_may_have_any_stride() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 50, 4, 24, generator=g)[..., 1:18].transpose(1, 2)
    k, v = (torch.randn(60, 2, 2, 21, generator=g)[::1, :, :, 2:19].permute(1, 2, 0, 3) for _ in range(2))
    want = sc.attend(q, k, v, "causal", kernel="chunk")
    torch.testing.assert_close(sc.attend(q, k, v, "causal", kernel="native"), want)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    torch.testing.assert_close(sc.attend(*turned, "causal", kernel="native"), want)
    one = torch.randn(1, 1, 1, 17, generator=g).expand(2, 4, 50, 17)
    torch.testing.assert_close(
        sc.attend(one, k, v, "causal", kernel="native"), sc.attend(one, k, v, "causal", kernel="chunk")
    )


def test_upstream_gradients_may_be_expanded() -> None:
    q, k, v = (torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3))
    got = torch.autograd.grad(sc.attend(q, k, v, "causal", kernel="native").sum(), (q, k, v))
    want = torch.autograd.grad(sc.attend(q, k, v, "causal", kernel="chunk").sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_logits_of_any_size(scale: float) -> None:
    call = draw("window(90)", rows=200, dtype=torch.float32)
    close(replace(call, q=call.q * scale), tolerance=1e-4)


def test_a_level_that_rises_with_every_key() -> None:
    k = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 1, 300, 16)
    q, v = torch.ones(1, 1, 300, 16), torch.randn(1, 1, 300, 16)
    want = sc.attend(q.double(), k.double(), v.double(), "causal").float()
    torch.testing.assert_close(sc.attend(q, k, v, "causal", kernel="native"), want)


def test_nan_stays_in_its_rows() -> None:
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    q[:, :, 3] = math.nan
    out = sc.attend(q, k, v, "causal", kernel="native")
    assert out[:, :, 3].isnan().all()
    assert out.isfinite().all(-1).sum() == 79
    k[:, :, 50] = math.nan
    out = sc.attend(q, k, v, "window(8)", kernel="native")
    assert out[:, :, 50:58].isnan().all()
    assert out[:, :, 58:].isfinite().all()


@pytest.mark.parametrize("text", ["causal", "window(40)", "window(6) + strided(7)"])
@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 1), (3, 3), (6, 2)])
def test_threads_share_the_work_and_repeat_it_bit_by_bit(text: str, heads: int, kv: int) -> None:
    call = draw(text, batch=1, rows=400, heads=heads, kv=kv, dim=16, dtype=torch.float32)
    torch.set_num_threads(3)
    try:
        close(call)
        first, again = (gradients(call, lambda c: answer(c, "native", True)) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [1, 8])
def test_few_rows_share_out_their_keys(rows: int, heads: int) -> None:
    torch.set_num_threads(4)
    try:
        for text in ("causal", "window(1500) + sink(4)"):
            close(
                draw(text, batch=1, rows=rows, keys=3000, heads=heads, kv=1, dtype=torch.float32), grad=False
            )
    finally:
        torch.set_num_threads(1)


def test_plain_threads_serve_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "pool", lambda: 0)
    torch.set_num_threads(3)
    try:
        close(draw("causal", rows=300, dtype=torch.float32))
    finally:
        torch.set_num_threads(1)


def test_half_and_double_are_refused_with_a_reason() -> None:
    q = torch.randn(1, 1, 8, 4)
    for dtype in (torch.float64, torch.float16):
        x = q.to(dtype)
        with pytest.raises(sc.NotSupported, match="for float32 and bfloat16"):
            sc.attend(x, x, x, "causal", kernel="native")
    for text, why in (
        ("alibi + causal", "logits part alibi"),
        ("entmax", "normaliser is entmax"),
        ("causal + tiles(8, 8)", "tiles of 8 x 8 were demanded"),
        ("linformer(rank=4, length=8)", "knows no summaries"),
        ("dilated(3, step=2)", "whole sequences of one length"),
    ):
        with pytest.raises(sc.NotSupported, match=why):
            sc.plan(text, (1, 1, 8, 4), kernel="native", ragged="dilated" in text)


def test_a_missing_engine_is_named_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "reason", lambda: "was not built: install saccade with a C++17 compiler at hand"
    )
    make.cache_clear()
    shown = str(sc.plan("causal + window(61)", (1, 3, 77, 16), lse=True))
    assert "the native engine was not built" in shown
    assert "native" not in shown.split("rejected")[0]
    monkeypatch.setattr(native, "engine", lambda: native.Engine(None, "does not load: gone"))
    monkeypatch.setattr(native, "reason", lambda: "does not load: gone")
    with pytest.raises(RuntimeError, match="the native engine does not load"):
        native.run(native.Call(), backward=False)
    make.cache_clear()


@pytest.mark.parametrize("text", [t for t in TEXTS if "rope" not in t and "+ sink_logit" not in t])
def test_intervals_hold_just_what_a_mask_holds(text: str) -> None:
    m = sc.mechanism(text)
    assert isinstance(m, sc.Pairwise)
    i, j = torch.arange(11, 80), torch.arange(80)
    found = intervals(m.pairs, i, 80)
    if found is None:
        return
    count = sum(((lo[:, None] <= j) & (j < hi[:, None])).long() for lo, hi in found)
    assert torch.equal(
        torch.as_tensor(count), static_exist(m.pairs, i[:, None], j[None]).expand(69, 80).long()
    )


def test_tables_are_small_kept_and_bounded() -> None:
    m = sc.mechanism("window(256) + strided(64)")
    assert isinstance(m, sc.Pairwise)
    parts = table(m.pairs, 1024, 1024, 0)
    assert parts is table(m.pairs, 1024, 1024, 0)
    assert parts is not None
    assert [type(p) for p in parts] == [Intervals, Listed]
    held = parts[0]
    assert isinstance(held, Intervals)
    assert (held.hi - held.lo).sum() == sum(min(i + 1, 256) for i in range(1024))
    kept = sum(p.nbytes for p in parts)
    assert kept < CACHE_BYTES
    pairs = sum((i // 64) - (min(i, 255) // 64) for i in range(1024))
    assert isinstance(parts[1], Listed)
    assert int((parts[1].tile[:, 1] * parts[1].tile[:, 3]).sum()) <= pairs


def test_the_listed_tiles_cover_each_pair_once() -> None:
    for text, n in (
        ("window(6) + strided(7)", 150),
        ("permuted(9, length=50)", 120),
        ("every(3, first=1)", 70),
    ):
        m = sc.mechanism(text)
        assert isinstance(m, sc.Pairwise)
        seen = torch.zeros(n, n, dtype=torch.long)
        for p in table(m.pairs, n, n, 0) or ():
            if isinstance(p, Intervals):
                for lo, hi in zip(p.lo[0], p.hi[0], strict=True):
                    seen += (lo[:, None] <= torch.arange(n)) & (torch.arange(n) < hi[:, None])
                continue
            for first, count, at, whole, other, bit in p.tile.tolist():
                rows, keys = (
                    p.row_order[first : first + count].long(),
                    p.key_order[at : at + whole + other].long(),
                )
                seen[rows[:, None], keys[None, :whole]] += 1
                masks = p.bits[bit : bit + other]
                seen[rows[:, None], keys[None, whole:]] += (masks[None] >> torch.arange(count)[:, None]) & 1
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        assert torch.equal(seen, static_exist(m.pairs, i, j).expand(n, n).long()), text
        assert cover(m.pairs, 0, n, n)
