"""Choices by content against plain loops: the choice itself, apart from the attention that follows it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.parts.bucket import CentroidBuckets
from saccade.parts.pair import Context
from saccade.parts.proxy import MeanKey
from saccade.parts.select import CentredSpan, TopBlocks
from saccade.parts.selection import Blocks, Buckets, Labels, Spans


def context(
    rows: int = 11, keys: int = 11, heads: int = 4, groups: int = 2, lengths: list[int] | None = None
) -> Context:
    q = torch.randn(2, heads, rows, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 5, dtype=torch.float64)
    return reference.context(q, k, v, key_lengths=None if lengths is None else torch.tensor(lengths))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.parametrize("lengths", [None, [7, 11]])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_mean_key(size: int, lengths: list[int] | None) -> None:
    c = context(lengths=lengths)
    got = MeanKey().keys(c, size)
    assert got.shape == (2, 2, -(-11 // size), 5)
    for b in range(2):
        end = 11 if lengths is None else lengths[b]
        for g in range(2):
            for block in range(got.shape[2]):
                members = [c.k[b, g, j] for j in range(block * size, (block + 1) * size) if j < end]
                want = sum(members) / len(members) if members else torch.zeros(5, dtype=torch.float64)
                torch.testing.assert_close(got[b, g, block], want)


@pytest.mark.parametrize("looks_back", [False, True])
@pytest.mark.parametrize(("rows", "lengths"), [(11, None), (4, None), (11, [11, 6])])
@pytest.mark.parametrize(("block", "top"), [(3, 2), (4, 1), (2, 50)])
def test_top_blocks(block: int, top: int, rows: int, lengths: list[int] | None, looks_back: bool) -> None:
    c = replace(context(rows=rows, lengths=lengths), looks_back=looks_back)
    chosen = TopBlocks(block, top).choose(c)
    for b in range(2):
        end = 11 if lengths is None else lengths[b]
        for h in range(4):
            for row in range(rows):
                i = row + 11 - rows
                means = {
                    n: sum(c.k[b, h // 2, j] for j in range(n * block, min(end, (n + 1) * block)))
                    / len(range(n * block, min(end, (n + 1) * block)))
                    for n in range(-(-end // block))
                    if not looks_back or n < i // block
                }
                scores = {n: dot(c.q[b, h, row], m) for n, m in means.items()}
                want = sorted(scores, key=lambda n: -scores[n])[:top]
                got = chosen.index[b, h, row][chosen.valid[b, h, row]].tolist()
                assert sorted(got) == sorted(want)
                assert len(set(got)) == len(got)


def test_no_future_block_is_ever_chosen() -> None:
    c = replace(context(rows=40, keys=40), looks_back=True)
    chosen = TopBlocks(4, 5).choose(c)
    own = torch.arange(40) // 4
    assert (chosen.index < own[None, None, :, None])[chosen.valid].all()


def test_the_choice_does_not_move_when_later_tokens_change() -> None:
    c = replace(context(rows=24, keys=24), looks_back=True)
    later = replace(c, k=torch.cat((c.k[:, :, :16], torch.randn_like(c.k[:, :, 16:])), 2))
    i = torch.arange(24)
    before, after = (TopBlocks(4, 2).choose(x).exist(slice(0, 16), i, i) for x in (c, later))
    assert torch.equal(before, after)


def test_blocks_exist_where_their_keys_are() -> None:
    index = torch.tensor([[[[0, 2], [1, 1]]]])
    valid = torch.tensor([[[[True, True], [True, False]]]])
    cols = torch.tensor([0, 3, 4, 7, 8, 9])
    found = Blocks(index, valid, 4).exist(slice(0, 2), cols[None], cols)
    assert found[0, 0].tolist() == [
        [True, True, False, False, True, True],
        [False, False, True, True, False, False],
    ]
    one = Blocks(index, valid, 4).exist(slice(1, 2), cols[None], cols)
    assert one[0, 0].tolist() == found[0, 0, 1:].tolist()


def test_a_block_of_rows_shares_its_choice() -> None:
    index = torch.tensor([[[[0], [2], [1]]]])
    chosen = Blocks(index, torch.ones_like(index, dtype=torch.bool), 2, rows=3)
    cols = torch.arange(6)
    found = chosen.exist(slice(2, 8), cols[None], cols)
    assert [[c for c in range(6) if row[c]] for row in found[0, 0].tolist()] == [
        [0, 1],
        [4, 5],
        [4, 5],
        [4, 5],
        [2, 3],
        [2, 3],
    ]


def test_no_gradient_through_the_choice() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    chosen = sc.attend(q, k, v, "moba(block=2, top=1)", need=("selection",)).selection
    assert isinstance(chosen, Blocks)
    assert not chosen.index.requires_grad


@pytest.mark.parametrize("half", [0, 2])
def test_centred_span(half: int) -> None:
    c = context()
    centre = torch.rand(2, 4, 11, dtype=torch.float64) * 11
    spans = CentredSpan(half).choose(replace(c, streams={"centre": centre}))
    assert isinstance(spans, Spans)
    j = torch.arange(11)
    found = spans.exist(slice(3, 9), j, j)
    for b in range(2):
        for h in range(4):
            for row in range(3, 9):
                p = centre[b, h, row].item()
                assert found[b, h, row - 3].tolist() == [p - half <= n <= p + half for n in range(11)]


def members(x: Tensor, centroid: Tensor, valid: int, width: int) -> list[int]:
    """The tokens that a centroid takes, in order of position."""
    near = [dot(x[n], centroid) for n in range(valid)]
    return sorted(sorted(range(valid), key=lambda n: -near[n])[:width])


@pytest.mark.parametrize("width", [None, 2, 100])
@pytest.mark.parametrize("lengths", [None, [7, 11]])
def test_centroid_buckets(width: int | None, lengths: list[int] | None) -> None:
    part = CentroidBuckets(3, width)
    centroids = torch.randn(4, 3, 5, dtype=torch.float64)
    c = replace(context(lengths=lengths), buffers={"centroids": centroids})
    chosen = part.choose(c)
    assert isinstance(chosen, Buckets)
    for b in range(2):
        end = 11 if lengths is None else lengths[b]
        wide = min(end, width or max(1, -(-end // 3)))
        assert part.bucket_width(end) == wide
        for h in range(4):
            for n in range(3):
                q = chosen.q[b, h, n][chosen.q_valid[b, h, n]].tolist()
                k = chosen.k[b, h, n][chosen.k_valid[b, h, n]].tolist()
                assert q == members(c.q[b, h], centroids[h, n], end, wide)
                assert k == members(c.k[b, h // 2], centroids[h, n], end, wide)


def test_in_decoding_a_token_belongs_to_its_nearest_centroid() -> None:
    centroids = torch.randn(4, 3, 5, dtype=torch.float64)
    c = replace(context(), buffers={"centroids": centroids}, decoding=True)
    labels = CentroidBuckets(3).choose(c)
    assert isinstance(labels, Labels)
    for b in range(2):
        for h in range(4):
            for n in range(11):
                for got, x in ((labels.q, c.q[b, h, n]), (labels.k, c.k[b, h // 2, n])):
                    assert got[b, h, n].item() == max(range(3), key=lambda m: dot(x, centroids[h, m]))


@pytest.mark.parametrize("valid", [None, torch.arange(6)[None] < torch.tensor([[4], [6]])])
def test_refresh_moves_each_centroid_towards_its_tokens(valid: Tensor | None) -> None:
    part = CentroidBuckets(2, keep=0.7)
    old = torch.nn.functional.normalize(torch.randn(2, 2, 3, dtype=torch.float64), dim=-1)
    q, k = torch.randn(2, 2, 2, 6, 3, dtype=torch.float64)
    got = part.refresh({"centroids": old}, q, k, valid, None)["centroids"]
    for h in range(2):
        for n in range(2):
            near = [
                x[b, h, t]
                for x in (q, k)
                for b in range(2)
                for t in range(6)
                if (valid is None or valid[b, t])
                and max(range(2), key=lambda m: dot(x[b, h, t], old[h, m])) == n
            ]
            target = sum(near) / len(near) if near else old[h, n]
            want = 0.7 * old[h, n] + 0.3 * target
            torch.testing.assert_close(got[h, n], want / want.norm())


def test_centroids_of_another_number_are_refused() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(
        sc.NotSupported, match=r"needs a buffer `centroids` \(heads, 3, head_dim\), got \(2, 5, 4\)"
    ):
        sc.attend(q, q, q, "centroid_buckets(3)", buffers={"centroids": torch.randn(2, 5, 4)})


def test_a_choice_is_a_value_that_replays() -> None:
    q, k, v = torch.randn(3, 1, 2, 12, 4, dtype=torch.float64)
    first = sc.attend(q, k, v, "moba(block=3, top=1)", need=("out", "selection"))
    other = sc.attend(-q, k, v, "moba(block=3, top=1)", need=("out", "selection"))
    assert not torch.equal(first.selection.index, other.selection.index)
    replayed = sc.attend(q, k, v, "moba(block=3, top=1)", selection=other.selection, need=("selection",))
    assert replayed.selection is other.selection
    torch.testing.assert_close(
        sc.attend(q, k, v, "moba(block=3, top=1)", selection=first.selection), first.out
    )
    assert not math.isclose(float(replayed.out.sum()), float(first.out.sum()))


def test_a_choice_leaks_only_where_it_says_so() -> None:
    assert sc.mechanism("causal + centroid_buckets(3)").causality == "leak"
    assert sc.mechanism("moba").causality == "safe"
    assert sc.mechanism("causal + centred_span(3)").causality == "safe"
    assert "decoding uses another form" in str(sc.plan("causal + centroid_buckets(3)", (1, 2, 64, 8)))
