"""Neighbourhoods on grids against the rule in words, and their errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade as sc
from parts.test_mask import claims_hold
from saccade.errors import MechanismError
from saccade.parts.algebra import cover
from saccade.parts.grid import GridNeighborhood


def read_on_an_axis(i: int, n: int, w: int, s: int, d: int, causal: bool, shift: bool) -> set[int]:
    """The coordinates that i reads: of its class, the w in a row that are centred best on its group's centre."""
    own = list(range(i % d, n, d))
    a = own.index(i)
    group = a // s * s
    if causal:
        last = min(group + s - 1, len(own) - 1) if shift else group + s - 1
        return {own[c] for c in range(len(own)) if last - w < c <= a}
    centre = group + s // 2
    if not shift:
        return {own[c] for c in range(centre - w // 2, centre - w // 2 + w) if 0 <= c < len(own)}
    starts = range(len(own) - w + 1)
    start = min(starts, key=lambda x: abs(x - (min(centre, len(own) - 1) - w // 2)))
    return {own[c] for c in range(start, start + w)}


def table(m: GridNeighborhood) -> torch.Tensor:
    """Who reads whom, cell by cell."""
    assert m.grid is not None
    cells = list(itertools.product(*map(range, m.grid)))
    exist = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for row, at in enumerate(cells):
        sets = [
            read_on_an_axis(x, a.size, a.window, a.stride, a.dilation, a.causal, a.shift)
            for x, a in zip(at, m.axes, strict=True)
        ]
        for col, to in enumerate(cells):
            exist[row, col] = all(x in read for x, read in zip(to, sets, strict=True))
    return exist


def found(m: GridNeighborhood) -> torch.Tensor:
    n = math.prod(m.grid or ())
    return m.exist(torch.arange(n)[:, None], torch.arange(n)[None])


def build(text: str) -> GridNeighborhood:
    (leaf,) = sc.mechanism(text).pairs.leaves()  # type: ignore[attr-defined]
    assert isinstance(leaf, GridNeighborhood)
    return leaf


TEXTS = [
    "na(7, grid=(40,))",
    "na(7, stride=3, grid=(40,))",
    "na(8, stride=8, grid=(40,))",
    "na(6, stride=4, dilation=3, grid=(40,))",
    "na(5, causal_axes=true, stride=3, grid=(40,))",
    "na(100, border=drop, grid=(40,))",
    "na(3, grid=(5, 8))",
    "na((5, 3), dilation=(1, 2), grid=(5, 8))",
    "na((2, 3), stride=(2, 3), border=drop, grid=(5, 8))",
    "na(3, causal_axes=(true, false), grid=(5, 8))",
    "na(3, causal_axes=true, dilation=2, grid=(5, 8))",
    "na(3, causal_axes=true, stride=2, border=drop, grid=(8, 5))",
    "na((2, 2, 3), stride=(2, 1, 2), grid=(2, 4, 5))",
    "na((1, 3, 5), causal_axes=(true, false, true), grid=(2, 4, 5))",
]


@pytest.mark.parametrize("text", TEXTS)
def test_existence_is_the_rule(text: str) -> None:
    m = build(text)
    assert torch.equal(found(m), table(m))
    claims_hold(m)


axes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.booleans())


@settings(max_examples=80, deadline=None)
@given(st.lists(axes, min_size=1, max_size=2), st.booleans())
def test_any_setting_is_the_rule(chosen: list[tuple[int, int, int, int, bool]], shift: bool) -> None:
    size, window, stride, dilation, causal = zip(*chosen, strict=True)
    stride = tuple(map(min, stride, window))
    open_ = GridNeighborhood(window, stride, dilation, causal, "shift" if shift else "drop")
    try:
        m = GridNeighborhood(window, stride, dilation, causal, open_.border, size)
    except MechanismError:
        assert shift
        assert any(w > max(1, n // d) and not c for n, w, _, d, c in chosen)
        return
    exist = found(m)
    assert torch.equal(exist, table(m))
    assert bool(exist.diagonal().all()) or max(stride) > 1
    rows = exist.shape[0]
    for i0 in range(0, rows, 5):
        spans = cover(m, i0, min(rows, i0 + 5), rows)
        outside = torch.ones(rows, dtype=torch.bool)
        for lo, hi in spans:
            outside[lo:hi] = False
        assert not exist[i0 : i0 + 5, outside].any()
    if m.looks_back:
        assert not exist.triu(1).any()


def test_with_shifted_borders_every_query_reads_as_many_keys() -> None:
    for text in ("na((3, 5), grid=(4, 9))", "na((4, 2), stride=2, dilation=(1, 3), grid=(4, 9))"):
        counts = found(build(text)).sum(1)
        assert counts.unique().tolist() == [math.prod(a.window for a in build(text).axes)]


def test_a_stride_of_the_window_makes_blocks() -> None:
    exist = found(build("na((2, 4), stride=(2, 4), grid=(4, 8))"))
    block = torch.tensor([(y // 2) * 2 + x // 4 for y in range(4) for x in range(8)])
    assert torch.equal(exist, block[:, None] == block[None])


def test_a_window_of_the_whole_grid_reads_everything() -> None:
    assert found(build("na((4, 9), grid=(4, 9))")).all()
    assert found(build("na(100, border=drop, grid=(4, 9))")).all()
    assert torch.equal(
        found(build("na(100, causal_axes=true, grid=(9,))")), torch.ones(9, 9, dtype=torch.bool).tril()
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("na(0)", "window must be a whole number of at least 1, got 0"),
        ("na((3, 0))", "window must be a whole number of at least 1, got 0"),
        ("na(true)", "window must be"),
        ("na(3.5)", "window must be"),
        ("na(3, border=wrap)", "one of shift, drop"),
        ("na((3, 3), dilation=(1, 2, 3))", "dilation has 3 values for 2 axes"),
        ("na((3, 3), grid=(4, 4, 4))", "window has 2 values for 3 axes"),
        ("na(3, causal_axes=(true, 2))", "causal_axes must be true or false"),
        ("na(3, stride=4)", "a stride is at most the window"),
        (
            "na((7, 9), grid=(8, 8))",
            r"window of 9.*spans 9 cells and the axis has 8.*at most 8, or border=drop",
        ),
        ("na(3, dilation=4, grid=(8, 8))", "window of 3, 4 apart.*at most 2"),
        ("na(3, dilation=9, grid=(8, 8))", "at most 1, or border=drop"),
        ("na(3, grid=(8, 0))", "grid must be"),
    ],
)
def test_bad_arguments(text: str, why: str) -> None:
    with pytest.raises(MechanismError, match=why):
        sc.mechanism(text)


def test_a_dilation_that_leaves_a_token_alone_is_the_token_itself_where_the_border_drops() -> None:
    assert torch.equal(
        found(build("na(3, dilation=9, border=drop, grid=(8,))")), torch.eye(8, dtype=torch.bool)
    )
    assert torch.equal(found(build("na(1, dilation=9, grid=(8,))")), torch.eye(8, dtype=torch.bool))


def test_the_grid_must_be_given_and_fit() -> None:
    q = torch.randn(1, 2, 12, 4)
    with pytest.raises(ValueError, match=r"stands on a grid: give one, as in attend\(..., grid="):
        sc.attend(q, q, q, "na(3)")
    with pytest.raises(ValueError, match="a grid of 3 x 5 has 15 cells, but there are 12 queries"):
        sc.attend(q, q, q, "na(3)", grid=(3, 5))
    with pytest.raises(ValueError, match="a grid of 3 x 5 has 15 cells"):
        sc.attend(q, q, q, "na(3, grid=(3, 5))")
    with pytest.raises(ValueError, match="a grid of 3 x 4 has 12 cells, but there are 5 queries"):
        sc.attend(q[:, :, :5], q, q, "na(3)", grid=(3, 4))
    with pytest.raises(ValueError, match=r"give one, as in attend"):
        sc.plan("na(3)", (1, 2, 12, 4))
    with pytest.raises(MechanismError, match="window of 5, 1 apart"):
        sc.attend(q, q, q, "na(5)", grid=(3, 4))


def test_the_text_keeps_the_grid() -> None:
    m = sc.mechanism("na((3, 5), stride=(1, 2), causal_axes=(true, false), border=drop)")
    assert str(m) == "na((3, 5), stride=(1, 2), causal_axes=(true, false), border=drop)"
    placed = m.on_grid((4, 9))
    assert sc.mechanism(str(placed)) == placed
    assert m.grids == {None}
    assert placed.grids == {(4, 9)}
    assert not placed.causal
    assert sc.mechanism("na(3, causal_axes=true)").causal


def test_a_causal_grid_decodes_cell_by_cell() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 4, dtype=torch.float64)
    m = sc.mechanism("na(3, causal_axes=true)").on_grid((4, 5))
    whole, state, rows = sc.attend(q, k, v, m), None, []
    for t in range(20):
        at = (slice(None), slice(None), slice(t, t + 1))
        step = sc.attend(q[at], k[at], v[at], m, state=state, need=("out", "state"))
        state = step.state
        rows.append(step.out)
    torch.testing.assert_close(torch.cat(rows, 2), whole)
    with pytest.raises(ValueError, match="20 cells, but there are 1 queries and 21 keys"):
        sc.attend(q[at], k[at], v[at], m, state=state, need=("out", "state"))
