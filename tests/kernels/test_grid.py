"""The grid kernel against the definition: any neighbourhood, any score, with all gradients."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc
from kernels.harness import agree, answer, draw, within_budget
from saccade.errors import NotSupported
from saccade.kernels.tiles import groups, strips, tile_sides
from saccade.parts.grid import Axis, GridNeighborhood

LINES = [
    "na(5",
    "na(8, stride=8",
    "na(4, dilation=3",
    "na(3, causal_axes=true, stride=2",
    "na(9, border=drop",
]
IMAGES = [
    "na(3",
    "na((5, 2), dilation=(1, 2)",
    "na((4, 5), stride=(4, 2), border=drop",
    "na(3, causal_axes=(false, true)",
]
VOLUMES = ["na(2", "na((3, 1, 3), stride=(3, 1, 2)", "na(2, causal_axes=true, border=drop"]
GRIDS = [("(37,)", LINES), ("(6, 11)", IMAGES), ("(3, 4, 5)", VOLUMES)]
TEXTS = [f"{text}, grid={grid})" for grid, texts in GRIDS for text in texts]


def cells(text: str) -> int:
    return math.prod(next(iter(sc.mechanism(text).grids)) or ())


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text, rows=cells(text)), "grid")


@pytest.mark.parametrize("rows", [1, 30, 64, 150])
@pytest.mark.parametrize("limit", ["", "causal + "])
def test_a_shuffled_order(limit: str, rows: int) -> None:
    agree(draw(f"{limit}permuted(9, length=60)", rows=rows, kv=2), "grid")
    agree(draw(f"{limit}permuted(301, length=60, seed=3)", rows=rows, kv=1), "grid")


@pytest.mark.parametrize("text", ["na(3, grid=(6, 11))", "na(9, dilation=2, grid=(37,))"])
@pytest.mark.parametrize("kv", [1, 2])
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, rows=cells(text), kv=kv, value=5), "grid")


@pytest.mark.parametrize(
    "text",
    [
        "na(3, grid=(6, 11)) + additive(6)",
        "na(3, grid=(6, 11)) + bilinear",
        "na(3, grid=(6, 11)) + alibi",
        "na(3, grid=(6, 11)) + gauss_gate(5)",
    ],
)
def test_other_scores_and_terms(text: str) -> None:
    agree(draw(text, rows=66, batch=3, kv=2), "grid")


@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 200])
def test_lengths_that_no_tile_divides(size: int) -> None:
    agree(draw(f"na(7, border=drop, grid=({size},))", rows=size, heads=2, dim=4), "grid")


def test_many_batches_of_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.kernels.tiles.NUMBERS", {"cpu": 3000, "cuda": 3000})
    agree(draw("na(3, dilation=(1, 2), grid=(9, 10))", rows=90), "grid")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    within_budget(draw("na(5, grid=(12, 13))", rows=156, kv=2, dim=16, dtype=dtype), "grid")


def test_tiles_are_the_rectangles_that_windows_reach() -> None:
    (first, middle, last) = strips(Axis(32, 7), 8)
    assert [tuple(s.cells.shape) for s in (first, middle, last)] == [(1, 8), (2, 8), (1, 8)]
    assert [s.keys.shape[1] for s in (first, middle, last)] == [11, 14, 11]
    assert middle.keys[:, [0, -1]].tolist() == [[5, 18], [13, 26]]
    (block,) = strips(Axis(32, 8, stride=8), 8)
    assert block.near.all()
    assert block.keys.shape == (4, 8)


def test_every_cell_is_in_one_tile() -> None:
    m = GridNeighborhood((3, 2), dilation=(2, 3), grid=(9, 10))
    found = torch.cat([g.cells.flatten() for g in groups(m, tile_sides(m), "cpu")])
    assert found.sort().values.tolist() == list(range(90))


def test_tiles_hold_whole_groups_of_a_stride() -> None:
    m = GridNeighborhood((7, 9), stride=(7, 3), grid=(49, 90))
    sides = tile_sides(m)
    assert sides[0] % 7 == 0
    assert sides[1] % 3 == 0


def test_what_it_refuses() -> None:
    q = torch.randn(2, 2, 12, 4)
    for options in (
        {"mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)},
        {"key_lengths": torch.tensor([12, 5])},
    ):
        with pytest.raises(NotSupported, match="takes no mask and no padding"):
            sc.attend(q, q, q, "na(3)", grid=(3, 4), kernel="grid", **options)
    with pytest.raises(NotSupported, match=r"grid: runs na\(...\) or permuted"):
        sc.attend(q, q, q, "window(3)", kernel="grid")
    with pytest.raises(NotSupported, match="for all 12 cells at once"):
        sc.attend(
            q[:, :, :5], q[:, :, :5], q[:, :, :5], "na(3, causal_axes=true)", grid=(3, 4), kernel="grid"
        )


def test_work_follows_the_window_and_nothing_of_length_times_length_is_kept() -> None:
    texts = [f"na({w}, grid=(64, 64))" for w in (3, 7, 15)]
    flops = [sc.plan(t, (1, 4, 4096, 32)).cost.flops for t in texts]
    assert flops[0] < flops[1] < flops[2] < 4 * 4096 * 4096 * 64 * 2 / 4
    shapes = {n: sc.Shape(1, 1, n * n, 16) for n in (32, 128)}
    small, large = (
        sc.plan(f"na(7, grid=({n}, {n}))", s, grad=True, kernel="grid").cost for n, s in shapes.items()
    )
    assert 15 < large.flops / small.flops < 19
    assert large.peak < 32 * small.peak
    call = draw("na(3, grid=(20, 20))", rows=400, heads=1, dim=4, batch=1).changed(
        lambda x: x.requires_grad_()
    )
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        answer(call, "grid", False)
    assert saved
    assert max(saved) <= call.q.numel()
