"""Masks against plain formulas, and what they claim about themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.errors import MechanismError
from saccade.parts.algebra import (
    And,
    Full,
    Mask,
    Or,
    Pairs,
    cover,
    is_static,
    merge_spans,
    split,
    static_exist,
)
from saccade.parts.mask import Causal, Chunk, Dilated, Global, Neighborhood, Sink, Strided, Window, rows_exist
from saccade.parts.select import TopBlocks

N = 40
Rule = Callable[[int, int], bool]


def rule(mask: Pairs) -> Rule:
    """The mask's definition in words of one pair (i, j)."""
    match mask:
        case Full():
            return lambda i, j: True
        case Causal():
            return lambda i, j: j <= i
        case Window(width=w):
            return lambda i, j: j in range(i - w + 1, i + 1)
        case Neighborhood(width=w, dilation=d):
            return lambda i, j: j in [i + d * n for n in range(-(w // 2), w // 2 + 1)]
        case Dilated(width=w, step=s):
            return lambda i, j: j in [i - s * n for n in range(w)]
        case Strided(step=s):
            return lambda i, j: j in range(i, -1, -s)
        case Chunk(size=c):
            return lambda i, j: i // c == j // c
        case Sink(first=n):
            return lambda i, j: j in range(n)
        case Global(tokens=n):
            return lambda i, j: i in range(n) or j in range(n)
        case And(parts=parts):
            rules = [rule(p) for p in parts]
            return lambda i, j: all(r(i, j) for r in rules)
        case Or(parts=parts):
            rules = [rule(p) for p in parts]
            return lambda i, j: any(r(i, j) for r in rules)
    raise AssertionError(f"no rule for {mask}")


MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(1),
    Window(5),
    Window(100),
    Neighborhood(1),
    Neighborhood(7),
    Neighborhood(5, dilation=3),
    Dilated(3, step=4),
    Dilated(1, step=2),
    Dilated(50, step=1),
    Strided(1),
    Strided(6),
    Chunk(1),
    Chunk(7),
    Chunk(100),
    Sink(1),
    Sink(4),
    Global(1),
    Global(3),
]


def table(pairs: Pairs, n: int = N) -> torch.Tensor:
    return static_exist(pairs, torch.arange(n)[:, None], torch.arange(n)[None]).expand(n, n)


def test_every_registered_mask_is_tested() -> None:
    assert {type(m) for m in MASKS} >= {
        c for c in Mask.__subclasses__() if c.__module__ in ("saccade.parts.algebra", "saccade.parts.mask")
    }


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_existence_is_the_formula(mask: Mask) -> None:
    holds = rule(mask)
    found = table(mask)
    for i in range(N):
        for j in range(N):
            assert bool(found[i, j]) == holds(i, j), (i, j)


def claims_hold(pairs: Pairs) -> None:
    """Everything that planner, kernels and caches take for granted about an expression."""
    exist = table(pairs)
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    if pairs.looks_back:
        assert not exist[(j > i)].any(), "it reads a later key"
    if pairs.shift_invariant:
        assert torch.equal(exist[:-3, :-3], exist[3:, 3:]), "it changes along the diagonal"
    if pairs.horizon is not None:
        assert not exist[(i - j).abs() >= pairs.horizon].any(), "it reads beyond its horizon"
    for i0, i1 in ((0, 1), (0, 5), (8, 16), (12, 18), (21, N)):
        found = rows_exist(pairs, i[i0:i1], j, i0, i1).expand(i1 - i0, N)
        assert torch.equal(found, exist[i0:i1]), "rows that are said to be alike are not"
    for keys in (1, 13, N):
        for i0, i1 in ((0, 1), (0, 9), (8, 16), (17, 18), (30, N), (0, N)):
            spans = cover(pairs, i0, i1, keys)
            edges = [x for span in spans for x in span]
            assert edges == sorted(set(edges)), "spans overlap, touch or are out of order"
            assert all(0 <= lo < hi <= keys for lo, hi in spans)
            covered = torch.zeros(keys, dtype=torch.bool)
            for lo, hi in spans:
                covered[lo:hi] = True
            assert not exist[i0:i1, :keys][:, ~covered].any(), f"rows {i0}..{i1} read outside {spans}"


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_claims_of_masks(mask: Mask) -> None:
    claims_hold(mask)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_spans_cover_and_are_ascending(mask: Mask) -> None:
    for i0 in range(0, N, 3):
        spans = mask.spans(i0, i0 + 5, N)
        assert spans == merge_spans(spans)
        inside = {j for lo, hi in spans for j in range(lo, hi)}
        holds = rule(mask)
        assert {j for j in range(N) for i in range(i0, i0 + 5) if holds(i, j)} <= inside


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_count_is_the_number_of_pairs(mask: Mask) -> None:
    holds = rule(mask)
    for i0, i1 in ((0, 7), (11, 30)):
        assert mask.count(i0, i1, N) == sum(holds(i, j) for i in range(i0, i1) for j in range(N))


def test_local_masks_are_covered_tightly() -> None:
    assert Window(5).spans(20, 24, 100) == [(16, 24)]
    assert Neighborhood(5, dilation=3).spans(20, 21, 100) == [(14, 27)]
    assert Dilated(3, step=4).spans(20, 21, 100) == [(12, 21)]
    assert Chunk(8).spans(9, 12, 100) == [(8, 16)]
    assert Chunk(8).spans(9, 17, 12) == [(8, 12)]
    assert Sink(4).spans(50, 60, 100) == [(0, 4)]
    assert Global(2).spans(1, 2, 100) == [(0, 100)]
    assert Global(2).spans(2, 3, 100) == [(0, 2)]
    assert cover(Causal() & (Window(3) | Sink(2)), 50, 51, 100) == [(0, 2), (48, 51)]
    assert cover(Window(3) & Sink(2), 50, 51, 100) == []


def test_horizons() -> None:
    assert Window(5).horizon == 5
    assert Dilated(3, step=4).horizon == 9
    assert (Window(5) | Dilated(3, step=4)).horizon == 9
    assert (Window(5) & Dilated(3, step=4)).horizon == 5
    assert (Window(5) | Sink(1)).horizon is None
    assert (Causal() & (Window(5) | Sink(1))).horizon is None
    assert (Causal() & Window(5)).horizon == 5
    assert Causal().horizon is None


expressions = st.recursive(
    st.sampled_from(MASKS),
    lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans()),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(expressions)
def test_any_expression_means_what_its_members_mean_and_keeps_its_claims(pairs: Pairs) -> None:
    holds = rule(pairs)
    want = torch.tensor([[holds(i, j) for j in range(N)] for i in range(N)])
    assert torch.equal(table(pairs), want)
    claims_hold(pairs)


@settings(max_examples=60, deadline=None)
@given(expressions, expressions, expressions)
def test_the_algebra(a: Pairs, b: Pairs, c: Pairs) -> None:
    assert (a & Full()) == a == (Full() & a)
    assert isinstance(a | Full(), Full)
    assert (a & a) == a
    assert (a | a) == a
    assert torch.equal(table((a & b) & c), table(a & (b & c)))
    assert torch.equal(table(a & (b | c)), table((a & b) | (a & c)))
    assert torch.equal(table(a | b), table(b | a))


def test_expressions_are_flat_values() -> None:
    e = (Causal() & Window(4)) & (Sink(1) | (Chunk(8) | Global(1)))
    assert e == And((Causal(), Window(4), Or((Sink(1), Chunk(8), Global(1)))))
    assert e.leaves() == (Causal(), Window(4), Sink(1), Chunk(8), Global(1))
    assert str(e) == "causal & window(4) & (sink(1) | chunk(8) | global)"
    assert hash(e) == hash((Causal() & Window(4)) & (Sink(1) | Chunk(8) | Global(1)))
    assert Causal() & Causal() == Causal()


def test_split_finds_limit_allowance_and_choice() -> None:
    top = TopBlocks(8)
    assert split(Causal() & (top | Chunk(8))) == (Causal(), Chunk(8), (top,))
    assert split(Causal() & Window(3)) == (Causal() & Window(3), None, ())
    assert split(top) == (Full(), None, (top,))
    assert split(Causal() & (top | Window(3) | Sink(1))) == (Causal(), Window(3) | Sink(1), (top,))
    assert split(top & TopBlocks(16)) is None
    assert split(top | (Causal() & Window(3))) is None
    assert is_static(Causal() & Window(3))
    assert not is_static(Causal() & (top | Chunk(8)))


def test_an_even_neighborhood_is_refused_with_both_neighbours() -> None:
    with pytest.raises(MechanismError, match=r"must be odd.*use 3 or 5, or window\(4\)"):
        Neighborhood(4)


def test_merge_spans() -> None:
    assert merge_spans([(5, 9), (0, 2), (2, 3), (8, 12), (4, 4)]) == [(0, 3), (5, 12)]
