"""S258, GNA: strides between sliding and blocked neighbourhoods, and the simulator of tiles."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from saccade.systems.neighborhood import gna, simulate
from systems.helpers import qkv

pytestmark = pytest.mark.system("S258")

Grid = tuple[int, ...]
SHAPES = [((24,), (6,)), ((8, 12), (4, 3)), ((4, 6, 4), (2, 3, 4))]


@pytest.mark.parametrize(("grid", "window"), SHAPES)
def test_a_stride_of_the_window_is_attention_inside_blocks(grid: Grid, window: Grid) -> None:
    q, k, v = qkv(2, 2, math.prod(grid), 8)
    cells = torch.arange(math.prod(grid))
    block, rest = torch.zeros_like(cells), math.prod(grid)
    for n, w in zip(grid, window, strict=True):
        rest //= n
        block = block * n + cells // rest % n // w
    truth = scaled_dot_product_attention(q, k, v, attn_mask=block[:, None] == block[None])
    for kernel in ("grid", "chunk"):
        found = sc.attend(q, k, v, gna(window, stride=window), grid=grid, kernel=kernel)
        torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "window"), [((24,), (7,)), ((8, 12), (3, 5)), ((4, 6, 4), (3, 3, 1))])
def test_a_stride_of_one_is_neighbourhood_attention(grid: Grid, window: Grid) -> None:
    q, k, v = qkv(2, 2, math.prod(grid), 8)
    sliding = sc.attend(q, k, v, sc.systems.neighborhood.fna(window), grid=grid)
    torch.testing.assert_close(sc.attend(q, k, v, gna(window), grid=grid), sliding, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "stride"), [((24,), (3,)), ((9, 12), (3, 2)), ((4, 6, 5), (2, 1, 3))])
def test_queries_of_a_group_read_the_window_of_its_middle(grid: Grid, stride: Grid) -> None:
    q, k, v = qkv(1, 1, math.prod(grid), 8)
    q = q[:, :, :1].expand_as(q)
    window = tuple(s + 1 for s in stride)
    found = sc.attend(q, k, v, gna(window, stride), grid=grid).view(*grid, -1)
    alone = sc.attend(q, k, v, gna(window), grid=grid).view(*grid, -1)
    for axis, s in enumerate(stride):
        own = torch.arange(grid[axis])
        middle = (own // s * s + s // 2).clamp(max=grid[axis] - 1)
        alone = alone.index_select(axis, middle)
    torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tile", [8, 16, 64])
def test_aligned_windows_touch_exactly_three_inner_tiles_and_sliding_ones_more(tile: int) -> None:
    grid = (16 * tile,)
    aligned = simulate(gna((3 * tile,), stride=(tile,)).on_grid(grid), (tile,), (tile,))
    sliding = simulate(gna((3 * tile,)).on_grid(grid), (tile,), (tile,))
    assert aligned.touched[1:-1].tolist() == [3] * 14
    assert (sliding.touched[2:-2] > 3).all()
    assert aligned.bound == pytest.approx(16 / 3)
    assert sliding.bound < aligned.bound


def test_tiles_multiply_over_axes_and_bound_the_speed() -> None:
    m = gna((24, 12), stride=(8, 4)).on_grid((64, 32))
    found = simulate(m, (8, 4), (8, 4))
    assert found.tiles == 64
    assert set(found.touched.tolist()) == {9}
    assert found.bound == pytest.approx(64 / 9)
    pairs = m.pairs.exist(torch.arange(2048)[:, None], torch.arange(2048)[None])  # type: ignore[attr-defined]
    exact = 2048 * 2048 / int(pairs.sum())
    assert found.bound == pytest.approx(exact)
    assert simulate(gna((24, 12)).on_grid((64, 32)), (8, 4), (8, 4)).bound < exact


def test_counted_tiles_are_those_that_hold_a_pair() -> None:
    m = gna((5, 6), (2, 3), (2, 1), (False, True)).on_grid((12, 18))
    exist = m.pairs.exist(torch.arange(216)[:, None], torch.arange(216)[None])  # type: ignore[attr-defined]
    by_class = exist.view(6, 2, 18, 6, 2, 18)
    touched = []
    for group in range(2):
        for y in range(0, 6, 2):
            for x in range(0, 18, 6):
                rows = by_class[y : y + 2, group, x : x + 6, :, group].any(0).any(0)
                touched.append(int(rows.view(2, 3, 3, 6).any(3).any(1).sum()))
    found = simulate(m, (2, 6), (3, 6))
    assert sorted(found.touched.tolist()) == sorted(touched)
    assert found.tiles == 2 * 2 * 3
