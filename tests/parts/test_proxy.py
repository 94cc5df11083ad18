"""Block scores against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade import reference
from saccade.parts.blockmap import BlockMass
from saccade.parts.pair import Context
from saccade.parts.proxy import BoundKey, MeanKey


def context(lengths: list[int] | None) -> Context:
    q = torch.randn(2, 4, 11, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 11, 5, dtype=torch.float64)
    return reference.context(q, k, v, key_lengths=None if lengths is None else torch.tensor(lengths))


def members(x: Tensor, block: int, size: int, end: int) -> Tensor:
    return x[block * size : min(end, (block + 1) * size)]


@pytest.mark.parametrize("lengths", [None, [7, 11]])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 4), (3, 4), (4, 3)])
def test_scores(rows: int, size: int, lengths: list[int] | None) -> None:
    c = context(lengths)
    ends = lengths or [11, 11]
    for proxy in (MeanKey(), BoundKey()):
        got = proxy.scores(proxy.prepare(c, size, rows), slice(1, 3), -(-11 // size))
        for b in range(2):
            for h in range(4):
                for n in range(1, 3):
                    own = members(c.q[b, h], n, rows, ends[b]) if rows > 1 else c.q[b, h, n : n + 1]
                    for u in range(got.shape[-1]):
                        keys = members(c.k[b, h // 2], u, size, ends[b])
                        if not len(own) or not len(keys):
                            continue
                        mean = own.mean(0)
                        if isinstance(proxy, MeanKey):
                            want = mean @ keys.mean(0)
                        else:
                            want = torch.maximum(mean * keys.amax(0), mean * keys.amin(0)).sum()
                        torch.testing.assert_close(got[b, h, n - 1, u], want / 5**0.5)


@pytest.mark.parametrize("lengths", [None, [7, 11]])
@pytest.mark.parametrize(("rows", "size"), [(1, 4), (3, 4), (4, 3)])
def test_block_mass(rows: int, size: int, lengths: list[int] | None) -> None:
    c, ends = context(lengths), lengths or [11, 11]
    got = BlockMass().scores(BlockMass().prepare(c, size, rows), slice(None), -(-11 // size)).exp()
    for b in range(2):
        for h in range(4):
            w = (c.q[b, h, : ends[b]] @ c.k[b, h // 2, : ends[b]].T / 5**0.5).softmax(-1)
            for n in range(-(-ends[b] // rows)):
                for u in range(-(-ends[b] // size)):
                    tile = w[n * rows : (n + 1) * rows, u * size : (u + 1) * size]
                    torch.testing.assert_close(got[b, h, n, u], tile.sum() / tile.shape[1])


def test_no_key_scores_above_its_blocks_bound() -> None:
    c = context(None)
    bound = BoundKey().scores(BoundKey().prepare(c, 4, 1), slice(0, 11), 3)
    real = c.q @ c.k.repeat_interleave(2, 1).transpose(-1, -2) / 5**0.5
    for block in range(3):
        assert (real[..., block * 4 : block * 4 + 4].amax(-1) <= bound[..., block] + 1e-12).all()
