"""Queries that choose key blocks one by one: choice, routing and attention over gathered rows, launched on Triton.

Legend: T choices a query, M blocks of `size` keys; a slot is one choice of one query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import sparse_run
from saccade.kernels.sparse_run import LOG2E, Launch, aligned, described, padded, ready
from saccade.kernels.table import BlockTable

MOST_BLOCKS = 2048
SPAN = 128


@dataclass(frozen=True)
class Routed:
    """Slots by block: index (b, h, L, T) int32 with -1 for no choice; slots (b h, L T); starts and counts (b h, M)."""

    index: Tensor
    slots: Tensor
    starts: Tensor
    counts: Tensor
    size: int

    def tiles(self, rows: int) -> Tensor:
        """The first tile of every block and their number, (b h, M + 1), in tiles of `rows` slots."""
        each = (self.counts + rows - 1) // rows
        return torch.nn.functional.pad(each.cumsum(1, dtype=torch.int32), (1, 0))


@dataclass(frozen=True)
class Rule:
    """Pairs of a chosen block that exist: key intervals that a row may read, and may not, each (b or 1, L); or all."""

    lo: Tensor
    hi: Tensor
    skip: Tensor
    to: Tensor
    whole: bool


def _rows(blocks: int, least: int = 1) -> int:
    """Rows of a tile whose rows meet every block, so many that it stays in registers."""
    return max(least, min(128, 8192 // padded(blocks)))


def _warps(blocks: int, rows: int) -> int:
    return 8 if padded(blocks) * rows > 8192 else 4


def choose(q: Tensor, means: Tensor, top: int, size: int, own: Tensor | None, ends: Tensor) -> Tensor:
    """The `top` best blocks of each query by its product with their mean keys, (b, h, L, top) int32, -1 for none.

    q (b, h, L, D), means (b, g, M, D) float32 or wider; `own` (b or 1, L), where given, leaves only blocks before it;
    blocks at or past `ends` (b or 1,) hold no key. Equal scores go to the earlier block.
    """
    from saccade.kernels import routed_triton

    q = ready(q)
    b, h, rows, d = q.shape
    g, blocks = means.shape[1:3]
    low = means.to(q.dtype).contiguous()
    split = q.dtype.itemsize < 4
    rest = (means - low.to(means.dtype)).to(q.dtype).contiguous() if split else low
    index = torch.empty(b, h, rows, top, dtype=torch.int32, device=q.device)
    tile = _rows(blocks, least=16)
    first = ends.to(torch.int32) if own is None else own.to(torch.int32).contiguous()
    routed_triton.choose[(-(-rows // tile) * b * h,)](
        q, low, rest, index, first, ends.to(torch.int32), *q.stride()[:3], int(ends.shape[0] > 1),
        0 if own is None or own.shape[0] == 1 else rows, h, g, rows, blocks, size, top,
        BM=tile, MP=padded(blocks), D=padded(d), DIM=d, BACK=own is not None, SPLIT=split,
        WIDE=sparse_run.wide(q), num_warps=_warps(blocks, tile),
    )  # fmt: skip
    return index


def route(index: Tensor, blocks: int, size: int) -> Routed:
    """List the slots of index (b, h, L, T) int32 by block, in order; nothing waits for the device."""
    from saccade.kernels import routed_triton

    b, h, rows, choices = index.shape
    spans, tile = -(-rows // SPAN), _rows(blocks)
    hist = torch.empty(b * h, spans, blocks, dtype=torch.int32, device=index.device)
    meta = {"SPAN": SPAN, "BM": tile, "MP": padded(blocks), "num_warps": _warps(blocks, tile)}
    routed_triton.count[(spans * b * h,)](index, hist, rows, blocks, choices, **meta)
    running = hist.cumsum(1, dtype=torch.int32)
    counts = running[:, -1].contiguous()
    starts = counts.cumsum(1, dtype=torch.int32) - counts
    slots = torch.zeros(b * h, rows * choices, dtype=torch.int32, device=index.device)
    base = running - hist + starts[:, None]
    routed_triton.place[(spans * b * h,)](index, base, slots, rows, blocks, choices, **meta)
    return Routed(index, slots, starts, counts, size)


def tiles(kind: str, q: Tensor, dim: int, size: int) -> Launch:
    """The launch of a kernel: as over tables, in tiles of keys that suit a block."""
    found = sparse_run.tiles(kind, q, dim)
    return sparse_run.replace(found, keys=max(16, min(found.keys, padded(size))))


def _call(q: Tensor, k: Tensor, v: Tensor, way: Routed, rule: Rule, most: int, *more: Tensor) -> list[int]:
    (_, h, rows, _), (_, g, keys, _) = q.shape, k.shape
    spread = rule.lo.shape[1] if rule.lo.shape[0] > 1 else 0
    blocks, choices = way.counts.shape[1], way.index.shape[3]
    return [
        *sparse_run.strides(q, k, v, *more), spread, h, g, rows, keys, way.size, blocks, choices, most,
    ]  # fmt: skip


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    d, e = q.shape[-1], v.shape[-1]
    return {"D": padded(d), "DIM": d, "E": padded(e), "EDIM": e, "WIDE": sparse_run.wide(q)}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    way: Routed,
    rule: Rule,
    beside: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the chosen blocks, joined with the (out, lse) of other pairs, whose tensors it takes."""
    from saccade.kernels import routed_triton

    q, k, v = ready(q), ready(k), ready(v)
    b, h, rows, d = q.shape
    e, choices, blocks = v.shape[-1], way.index.shape[3], way.counts.shape[1]
    run = tiles("forward", q, max(padded(d), padded(e)), way.size)
    most = -(-rows * choices // run.rows) + blocks
    parts = torch.empty(b * h, rows * choices, e, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    levels = torch.full((b * h, rows * choices), -torch.inf, dtype=wide, device=q.device)
    routed_triton.forward[(most * b * h,)](
        q, described(k, run.keys, run.copies), described(v, run.keys, run.copies),
        way.slots, way.starts, way.counts, way.tiles(run.rows), parts, levels,
        rule.lo, rule.hi, rule.skip, rule.to, scale * LOG2E, *_call(q, k, v, way, rule, most),
        BM=run.rows, BN=run.keys, MASKED=_masked(rule, way, run), TMA=run.copies,
        ALIGN=aligned(q, k, v), **_sizes(q, v), **run.options,
    )  # fmt: skip
    return merge(parts.view(b, h, rows, choices, e), levels.view(b, h, rows, choices), beside, q.dtype)


def _masked(rule: Rule, way: Routed, run: Launch) -> bool:
    return not rule.whole or bool(way.size % run.keys)


def merge(
    parts: Tensor, levels: Tensor, beside: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out (b, h, L, E), lse (b, h, L)) of parts (b, h, L, T, E) and their levels, and of (out, lse), written in place."""
    from saccade.kernels import routed_triton

    b, h, rows, choices, e = parts.shape
    if beside is None:
        out = torch.empty(b, h, rows, e, dtype=dtype, device=parts.device)
        lse = torch.empty(b, h, rows, dtype=levels.dtype, device=parts.device)
    else:
        out, lse = beside
    tile = max(1, 4096 // padded(e))
    routed_triton.merge[(-(-b * h * rows // tile),)](
        parts, levels, out, lse, b * h * rows, choices,
        BM=tile, E=padded(e), EDIM=e, BESIDE=beside is not None, WIDE=sparse_run.wide(lse),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    way: Routed,
    rule: Rule,
    scale: float,
    beside: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through the chosen blocks, added to those of other pairs, whose tensors it takes."""
    from saccade.kernels import routed_triton

    q, k, v, grad = ready(q), ready(k), ready(v), ready(grad)
    b, h, rows, d = q.shape
    g, e, choices, blocks = k.shape[1], v.shape[-1], way.index.shape[3], way.counts.shape[1]
    dim = max(padded(d), padded(e))
    dq, dk, dv = beside
    lse, delta = lse.contiguous(), delta.contiguous()
    run = tiles("queries", q, dim, way.size)
    most = -(-rows * choices // run.rows) + blocks
    parts = torch.empty(b * h, rows * choices, d, dtype=q.dtype, device=q.device)
    rules = (rule.lo, rule.hi, rule.skip, rule.to)
    routed_triton.backward_queries[(most * b * h,)](
        q, described(k, run.keys, run.copies), described(v, run.keys, run.copies), grad, lse, delta,
        way.slots, way.starts, way.counts, way.tiles(run.rows), parts, *rules, scale * LOG2E,
        *_call(q, k, v, way, rule, most, grad),
        BM=run.rows, BN=run.keys, MASKED=_masked(rule, way, run), TMA=run.copies,
        ALIGN=aligned(q, k, v, grad), **_sizes(q, v), **run.options,
    )  # fmt: skip
    tile = max(1, 4096 // padded(d))
    routed_triton.add[(-(-b * h * rows // tile),)](
        parts, way.index, dq, b * h * rows, choices, BM=tile, D=padded(d), DIM=d, WIDE=sparse_run.wide(q)
    )
    run = tiles("keys", q, dim, way.size)
    whose = (way.slots // choices).long()
    lse, delta = (x.view(b * h, rows).gather(1, whose) for x in (lse, delta))
    routed_triton.backward_keys[(-(-way.size // run.keys) * blocks * b * g,)](
        q, k, v, grad, lse, delta, dk, dv, way.slots, way.starts, way.counts, *rules, scale * LOG2E,
        *_call(q, k, v, way, rule, 0, grad),
        BM=run.rows, BN=run.keys, MASKED=_masked(rule, way, run),  ALIGN=aligned(q, k, v, grad),
        **_sizes(q, v), **run.options,
    )  # fmt: skip
    return dq, dk, dv


class Attend(torch.autograd.Function):
    """Chosen blocks and a table of other pairs as one differentiable step; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        way: Routed,
        rule: Rule,
        table: BlockTable | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        beside = None if table is None else sparse_run.forward(q, k, v, table, scale)
        out, lse = forward(q, k, v, way, rule, beside, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = (way, rule, table, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        way, rule, table, scale = ctx.plan
        delta = sparse_run.row_products(out, grads[0], grads[1])
        if table is None:
            beside = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        else:
            beside = sparse_run.backward(grads[0], delta, q, k, v, lse, table, scale)
        found = backward(grads[0], delta, q, k, v, lse, way, rule, scale, beside)  # type: ignore[arg-type]
        return (*found, None, None, None, None)


def attend(
    q: Tensor, k: Tensor, v: Tensor, way: Routed, rule: Rule, table: BlockTable | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) over chosen blocks and the pairs of a table, differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attend.apply(q, k, v, way, rule, table, scale)
        return out, lse
    beside = None if table is None else sparse_run.forward(q, k, v, table, scale)
    return forward(q, k, v, way, rule, beside, scale)


def decode(q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a few queries over a table of single rows: lists are split among programs, whose results merge."""
    from saccade.kernels import sparse_triton

    q, k, v = ready(q), ready(k), ready(v)
    b, h, rows, _ = q.shape
    g, keys, e = k.shape[1], k.shape[2], v.shape[-1]
    together = table.state.shape[1] == 1 and h // g <= 16
    stacks = b * (g if together else h) * rows
    width = table.state.shape[3]
    parts = max(1, min(width, 512 // max(1, stacks)))
    each = -(-width // parts)
    parts = -(-width // each)
    wide = torch.promote_types(q.dtype, torch.float32)
    found = torch.empty(b, h, rows, parts, e, dtype=wide, device=q.device)
    levels = torch.empty(b, h, rows, parts, dtype=wide, device=q.device)
    lists, sizes = sparse_run.table_arguments(table, table.by_query)
    sparse_triton.decode[(parts * stacks,)](
        q, k, v, found, levels, *lists, scale * LOG2E, *sparse_run.strides(q, k, v), *sizes, h, g, rows, keys,
        parts, each, SIZE=table.size, BN=min(64, padded(table.size)), TOGETHER=together, BITS=table.bits is not None,
        num_warps=4, num_stages=2, **_sizes(q, v),
    )  # fmt: skip
    return merge(found, levels, None, q.dtype)
