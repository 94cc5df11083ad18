"""A plain Triton loop over lists of whole and partial blocks, forward only: what one writes in an afternoon, as a peer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _loop(
    Q, K, V, Out, Index, Count, Full, Lo, Hi, scale, length, width, heads,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1)
    i = n * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    base = head.to(tl.int64) * length * D
    listed = head % heads * tl.num_programs(0) + n
    q = tl.load(Q + base + i[:, None] * D + d[None, :], mask=(i < length)[:, None], other=0.0)
    lo, hi = tl.load(Lo + i, mask=i < length, other=0), tl.load(Hi + i, mask=i < length, other=0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    full, count = tl.load(Full + listed), tl.load(Count + listed)
    for t in range(0, full):
        j = tl.load(Index + listed * width + t) * BLOCK + tl.arange(0, BLOCK)
        k = tl.load(K + base + j[:, None] * D + d[None, :])
        v = tl.load(V + base + j[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(k)) * scale
        risen = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - risen[:, None])
        shrink = tl.exp2(top - risen)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = risen
    for t in range(full, count):
        j = tl.load(Index + listed * width + t) * BLOCK + tl.arange(0, BLOCK)
        k = tl.load(K + base + j[:, None] * D + d[None, :], mask=(j < length)[:, None], other=0.0)
        v = tl.load(V + base + j[:, None] * D + d[None, :], mask=(j < length)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), s, float("-inf"))
        risen = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(risen == float("-inf"), 0.0, risen)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = risen
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        Out + base + i[:, None] * D + d[None, :], out.to(Out.dtype.element_ty), mask=(i < length)[:, None]
    )


def attend(q: Tensor, k: Tensor, v: Tensor, table) -> Tensor:  # type: ignore[no-untyped-def]
    """Out of contiguous q, k and v (1, h, L, D) over a table of 128 x 128 blocks."""
    _, h, length, dim = q.shape
    found = table.by_query
    out = torch.empty_like(q)
    _loop[(table.state.shape[2], h)](
        q, k, v, out, found.index, found.count, found.full, table.lo, table.hi, dim**-0.5 * 1.4426950408889634,
        length, found.index.shape[3], found.index.shape[1], BLOCK=128, D=dim, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
