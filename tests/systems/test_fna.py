"""S291, FNA: neighbourhood attention in one, two and three dimensions, tiled, against masks over all pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from saccade.errors import MechanismError
from systems.helpers import flops, largest_temporary, qkv

pytestmark = pytest.mark.system("S291")

Grid = tuple[int, ...]


def nearest(i: int, n: int, window: int, dilation: int, causal: bool) -> list[int]:
    """The coordinates that i reads: the `window` of its class nearest to it, or latest up to it."""
    own = range(i % dilation, n, dilation)
    if causal:
        return [c for c in own if i - window * dilation < c <= i]
    return sorted(own, key=lambda c: (abs(c - i), c))[:window]


def mask_of(grid: Grid, window: Grid, dilation: Grid, causal: tuple[bool, ...]) -> Tensor:
    """Who reads whom, (cells, cells)."""
    cells = list(itertools.product(*map(range, grid)))
    number = {cell: at for at, cell in enumerate(cells)}
    exist = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for at, cell in enumerate(cells):
        near = [nearest(*axis) for axis in zip(cell, grid, window, dilation, causal, strict=True)]
        exist[at, [number[c] for c in itertools.product(*near)]] = True
    return exist


CASES = [
    ((40,), (7,), (1,), (False,)),
    ((40,), (5,), (3,), (False,)),
    ((40,), (5,), (2,), (True,)),
    ((9, 12), (3, 5), (1, 2), (False, False)),
    ((9, 12), (3, 3), (3, 1), (False, True)),
    ((9, 12), (5, 3), (1, 3), (True, True)),
    ((4, 5, 6), (3, 5, 3), (1, 1, 2), (False, False, False)),
    ((4, 5, 6), (3, 1, 3), (1, 3, 1), (True, False, False)),
]


@pytest.mark.parametrize("kernel", ["grid", "chunk", "slab"])
@pytest.mark.parametrize(("grid", "window", "dilation", "causal"), CASES)
def test_every_path_equals_masked_attention_and_its_gradients(
    kernel: str, grid: Grid, window: Grid, dilation: Grid, causal: tuple[bool, ...]
) -> None:
    exist = mask_of(grid, window, dilation, causal)
    leaves = [x.requires_grad_() for x in qkv(2, 2, math.prod(grid), 8)]
    m = sc.systems.neighborhood.fna(window, dilation, causal)
    found = sc.attend(*leaves, m, grid=grid, kernel=kernel)
    truth = scaled_dot_product_attention(*leaves, attn_mask=exist)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    weight = torch.randn_like(truth)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weight) for x in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(15,), (5, 7), (3, 5, 3)])
def test_a_window_of_the_grid_is_full_attention(grid: Grid) -> None:
    q, k, v = qkv(2, 2, math.prod(grid), 8)
    found = sc.attend(q, k, v, sc.systems.neighborhood.fna(grid), grid=grid)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0)


def test_work_and_memory_follow_the_window_and_the_cells() -> None:
    q, k, v = qkv(1, 4, 4096, 32, dtype=torch.float32)
    sparse = flops(lambda: sc.attend(q, k, v, "fna", grid=(64, 64)))
    assert sparse < 4 * 4096 * 4096 * 32 * 4 / 6
    temporaries = [
        largest_temporary(lambda w=w: sc.attend(q, k, v, f"fna({w})", grid=(64, 64))) for w in (3, 7, 15, 31)
    ]
    assert max(temporaries) <= 3 * temporaries[0]
    assert max(temporaries) < 4 * 4096 * 4096 * 4 / 20
    grids = [sc.mechanism(f"fna({w})").on_grid((64, 64)) for w in (3, 7, 31)]
    planned = [sc.plan(m, (1, 4, 4096, 32), grad=True, kernel="grid").cost.peak for m in grids]
    assert max(planned) < 3 * min(planned)


def test_the_plan_takes_the_tiles() -> None:
    m = sc.mechanism("fna").on_grid((64, 64))
    assert sc.plan(m, (1, 4, 4096, 32)).kernel in ("grid", "native")
    assert sc.plan(m, (1, 4, 4096, 32), grad=True).kernel in ("grid", "native")


def test_a_layer_takes_images() -> None:
    layer = sc.nn.Attention(16, 2, "fna(3)").double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    moved = x.clone()
    moved[:, 29] += 1
    gap = (layer(moved, grid=(5, 6)) - layer(x, grid=(5, 6))).abs().amax((0, 2)).view(5, 6)
    assert (gap > 0).sum() == 4
    assert (gap[3:, 4:] > 0).all()


def test_an_even_window_is_refused() -> None:
    with pytest.raises(
        MechanismError, match=r"fna: window must be odd, got 8; use 7 or 9, or gna\(window=8\)"
    ):
        sc.mechanism("fna((3, 8))")
