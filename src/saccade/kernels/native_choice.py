"""Chosen key blocks for the native engine: the interval that limits them, and what a choice costs before it is made."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saccade import native
from saccade.cost import Request
from saccade.kernels.native_table import Intervals, Table, ragged_table, table
from saccade.mechanism.values import Pairwise
from saccade.native import Array, Call, Choice
from saccade.parts.algebra import Full, Pairs
from saccade.parts.budget import Share, Top
from saccade.parts.pair import Context
from saccade.parts.proxy import MeanKey, Proxy
from saccade.parts.select import Choice as Choose
from saccade.parts.select import TopBlocks, choice_of
from saccade.parts.selection import Blocks

MOST = 64  # choices a row that are kept sorted while its blocks are scored
RANGE = 2048  # rows whose choices the engine sorts at a time, forward


@dataclass(frozen=True)
class Chosen:
    """Key blocks chosen for the rows, inside one interval [lo, hi) of keys a row: both (1 or b, rows), int32."""

    blocks: Blocks
    lo: Tensor
    hi: Tensor


def form_of(m: Pairwise) -> tuple[Pairs, Pairs | None, Choose] | None:
    """`limit & (allow | choice)` as its members; None where pairs have another form.

    Single keys are gathered elsewhere, and so is a budget whose size is known only once it is spent.
    """
    form = choice_of(m.pairs)
    if form is None or form[2].size == 1 or not isinstance(form[2].keep, Top | Share):
        return None
    return form


def tables(m: Pairwise, r: Request) -> tuple[Table, Table] | None:
    """The positional part and the limit of a request, as planned; None where one of them is no short list of intervals."""
    form, s = form_of(m), r.shape
    if form is None:
        return None
    limit, allow, _ = form
    found = tuple(
        () if p is None else table(p, s.length, s.keys, s.keys - s.length)
        for p in (None if allow is None else limit & allow, limit)
    )
    plain = all(
        p is not None and all(isinstance(x, Intervals) and x.row_order is None for x in p) for p in found
    )
    if not plain or not found[1] or found[1][0].lo.shape[1] != 1:  # type: ignore[union-attr]
        return None
    return found  # type: ignore[return-value]


@torch.no_grad()
def choose(select: Choose, c: Context) -> Blocks:
    """What `select.choose` answers; where a vector a block scores a query, the engine scores and sorts, of equals the first block."""
    blocks, rows = -(-c.k.shape[2] // select.size), c.q.shape[2]
    choices = select.keep.most(blocks)
    product = isinstance(select, TopBlocks) and type(select.proxy).scores is Proxy.scores
    if not product or not isinstance(select.keep, Top) or select.height > 1 or choices > MOST:
        chosen = select.choose(c)
        assert isinstance(chosen, Blocks)
        return chosen
    assert isinstance(select, TopBlocks)
    if isinstance(select.proxy, MeanKey):
        q, vectors = lined(c.q), select.proxy.keys(c, select.size)
    else:
        q, vectors = (x.to(torch.float32).contiguous() for x in select.proxy.prepare(c, select.size, 1))
    vectors = vectors.to(torch.float32).contiguous()
    bound = (c.key_ends[:, None] + select.size - 1) // select.size
    if c.looks_back:
        bound = torch.minimum(bound, torch.div(c.i, select.size, rounding_mode="floor") + select.own)
    bound = bound.expand(-1, rows).to(torch.int32).contiguous()
    index = torch.empty(*c.q.shape[:3], choices, dtype=torch.long)
    valid = torch.empty(index.shape, dtype=torch.bool)
    call = Call(
        bf16=q.dtype == torch.bfloat16,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=c.k.shape[1],
        rows=rows,
        dim=q.shape[-1],
        value_dim=1,
        q=Array.of(q),
        isa=-1,
    )
    native.choose(
        call,
        Choice(
            vectors.data_ptr(),
            blocks,
            choices,
            bound.data_ptr(),
            len(bound) > 1,
            index.data_ptr(),
            valid.data_ptr(),
        ),
    )
    return Blocks(index, valid, select.size)


def lined(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def bind(m: Pairwise, c: Context) -> tuple[Table, Chosen]:
    """The positional part of a call, and the blocks that its queries choose."""
    form = form_of(m)
    assert form is not None
    limit, allow, select = form
    blocks = c.selection if c.selection is not None else choose(select, replace(c, looks_back=m.causal))
    assert isinstance(blocks, Blocks)
    rows, keys = c.q.shape[2], c.k.shape[2]

    def of(pairs: Pairs) -> Table:
        if c.ends is not None:
            found = ragged_table(pairs, c.i, keys, c.start, c.ends)
        else:
            assert c.offset is not None
            found = table(pairs, rows, keys, c.offset, c.start)
        assert found is not None
        return found

    (bound,) = of(limit)
    assert isinstance(bound, Intervals)
    blocks = replace(blocks, index=blocks.index.contiguous(), valid=blocks.valid.contiguous())
    parts = () if allow is None else of(allow if isinstance(limit, Full) else limit & allow)
    return parts, Chosen(blocks, bound.lo[:, 0], bound.hi[:, 0])


@functools.lru_cache(maxsize=512)
def lanes_expected(select: Choose, past: bool, rows: int, keys: int, most: int) -> int:
    """Lanes that meet a chosen block, summed over the blocks of a head, for even choices sorted `most` rows at a time."""
    blocks = -(-keys // select.size)
    most_of = np.array([0, *(select.keep.most(n) for n in range(1, blocks + 1))])
    own = np.arange(keys - rows, keys) // select.size + select.own
    each = most_of[own.clip(0, blocks)] / np.maximum(1, own) if past else np.full(rows, most_of[-1] / blocks)
    total = 0.0
    for first in range(0, rows, most):
        last = min(rows, first + most)
        if past:
            share = np.bincount(np.maximum(own[first:last], 0), each[first:last], blocks)
            counts = share[::-1].cumsum()[::-1] - share
        else:
            counts = np.full(blocks, each[first:last].sum())
        total += float((counts + np.minimum(8, 16 * counts)).sum())
    return round(total)


def state_bytes(m: Pairwise, r: Request) -> int:
    """Bytes that a choice takes: its index, and the state of the rows in flight."""
    form, s = form_of(m), r.shape
    assert form is not None
    blocks = -(-s.keys // form[2].size)
    choices, stacks = form[2].keep.most(blocks), s.batch * s.heads
    index = 9 * stacks * s.length * choices
    rows = s.length if r.grad else min(s.length, RANGE)
    state = 4 * torch.get_num_threads() * rows * (max(s.head_dim, s.value_dim) + 2 + choices)
    return index + state
