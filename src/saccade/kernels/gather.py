"""Softmax over key blocks gathered for blocks of queries, united with a mask by position.

Every block of queries meets the tokens of its chosen blocks in one dense tile, a slab of blocks at a time; the part by
position is a band, and the two merge by lse. Backward gathers and recomputes each slab.

Legend: b batch, h query heads, N blocks of R queries, T choices a block, W = T x size gathered tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.band import tile_softmax
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.block import Sparse, bind, positional_area
from saccade.kernels.chunk import softmax_only
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import static_exist
from saccade.parts.pair import Context
from saccade.parts.select import choice_of
from saccade.parts.selection import Blocks

SLAB_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 27}


@dataclass(frozen=True)
class Slab:
    """Some blocks of queries: rows and used (M, R), gathered tokens (b, h, M, W) and exist (b, h, M, R, W)."""

    rows: Tensor
    used: Tensor
    tokens: Tensor
    flat: Tensor
    exist: Tensor


def once(chosen: Blocks, cut: slice) -> tuple[Tensor, Tensor]:
    """Chosen blocks in ascending order, and which count: valid ones, the first of equals."""
    index, valid = chosen.index[:, :, cut], chosen.valid[:, :, cut]
    last = index.new_full((), torch.iinfo(index.dtype).max)
    index = torch.where(valid, index, last).sort(dim=-1).values
    fresh = torch.ones_like(index, dtype=torch.bool)
    fresh[..., 1:] = index[..., 1:] != index[..., :-1]
    kept = fresh & (index != last)
    return index.masked_fill(~kept, 0), kept


def slab(sparse: Sparse, cut: slice, q: Tensor, k: Tensor) -> Slab:
    """What the blocks of queries in `cut` gather."""
    chosen, (b, h, length, _), (_, g, keys, _) = sparse.chosen, q.shape, k.shape
    index, kept = once(chosen, cut)
    tokens = (index.unsqueeze(-1) * chosen.size + torch.arange(chosen.size, device=q.device)).flatten(-2)
    there = kept.repeat_interleave(chosen.size, -1) & (tokens < keys)
    tokens = tokens.masked_fill(~there, 0)
    numbers = torch.arange(cut.start, cut.stop, device=q.device)[:, None] * chosen.rows
    rows = numbers + torch.arange(chosen.rows, device=q.device)
    used = rows < length
    rows = rows.clamp(max=length - 1)
    i = sparse.i[:, None, rows, None]
    j = (tokens + sparse.start).unsqueeze(-2)
    exist = there.unsqueeze(-2) & static_exist(sparse.limit, i, j) & used[:, :, None]
    if sparse.allow is not None:
        exist = exist & ~static_exist(sparse.allow, i, j)
    if sparse.ends is not None:
        exist = exist & (tokens < sparse.ends[:, None, None, None]).unsqueeze(-2)
    owner = torch.arange(b, device=q.device)[:, None] * g + torch.arange(h, device=q.device) // (h // g)
    return Slab(rows, used, tokens, (owner[:, :, None, None] * keys + tokens).flatten(), exist)


def slabs(sparse: Sparse, q: Tensor, k: Tensor, v: Tensor) -> list[slice]:
    """Blocks of queries that run together."""
    chosen = sparse.chosen
    groups, choices = chosen.index.shape[2:]
    each = _numbers(chosen.rows, choices * chosen.size, k.shape[-1] + v.shape[-1])
    step = _step(each * q.shape[0] * q.shape[1], q.device.type)
    return [slice(n, min(groups, n + step)) for n in range(0, groups, step)]


def _numbers(rows: int, width: int, sizes: int) -> int:
    return width * (sizes + 2 * rows) + rows * sizes


def _step(each: int, device: str) -> int:
    return max(1, SLAB_NUMBERS["cpu" if device == "cpu" else "cuda"] // max(1, each))


def _take(x: Tensor, s: Slab) -> Tensor:
    """Gathered rows (b, h, M, W, d) of x (b, g, S, d)."""
    return x.reshape(-1, x.shape[-1])[s.flat].view(*s.tokens.shape, x.shape[-1])


def _rows(x: Tensor, s: Slab) -> Tensor:
    """Rows of queries (b, h, M, R, ...) of x (b, h, L, ...)."""
    return x[:, :, s.rows]


def _logits(q: Tensor, k: Tensor, exist: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q @ k.transpose(-1, -2)).to(wide).masked_fill_(~exist, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of prepared q, k and v."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = sparse.positional(q, k, v, wide)
    for cut in slabs(sparse, q, k, v):
        s = slab(sparse, cut, q, k)
        p, part = tile_softmax(_logits(_rows(q, s), _take(k, s), s.exist), True, True)
        assert part is not None
        vt = _take(v, s)
        mixed = (p.to(vt.dtype) @ vt).to(wide)
        far, far_out, near = (_flat(x, s) for x in (part, mixed, _rows(lse, s)))
        here = s.rows[s.used]
        joint = torch.logaddexp(near, far)
        base = joint.masked_fill(torch.isneginf(joint), 0.0)
        shares = ((x - base).exp().unsqueeze(-1) for x in (near, far))
        out[:, :, here] = (next(shares) * out[:, :, here].to(wide) + next(shares) * far_out).to(q.dtype)
        lse[:, :, here] = joint
    return out, lse


def _flat(x: Tensor, s: Slab) -> Tensor:
    """The rows that exist of x (b, h, M, R, ...), one after the other."""
    return x[:, :, s.used]


def backward(
    grad: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sparse: Sparse
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prepared q, k and v."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (x.contiguous() for x in sparse.positional_back(grad, delta, q, k, v, lse))
    dk, dv = dk.to(wide), dv.to(wide)
    base = lse.masked_fill(torch.isneginf(lse), 0.0)
    for cut in slabs(sparse, q, k, v):
        s = slab(sparse, cut, q, k)
        qs, gs, kt, vt = _rows(q, s), _rows(grad, s), _take(k, s), _take(v, s)
        p = (_logits(qs, kt, s.exist) - _rows(base, s).unsqueeze(-1)).exp_()
        dp = (gs @ vt.transpose(-1, -2)).to(wide).sub_(_rows(delta, s).unsqueeze(-1)).mul_(p)
        low, dlow = p.to(vt.dtype), dp.to(kt.dtype)
        here = s.rows[s.used]
        dq[:, :, here] += _flat((dlow @ kt).to(dq.dtype), s)
        for target, a, x in ((dk, dlow, qs), (dv, low, gs)):
            step = (a.transpose(-1, -2) @ x).to(wide)
            target.view(-1, target.shape[-1]).index_add_(0, s.flat, step.reshape(-1, step.shape[-1]))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class Attend(torch.autograd.Function):
    """Gathered blocks and the part by position as one differentiable step; saves q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, sparse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sparse = sparse
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (out.to(lse.dtype) * grads[0].to(lse.dtype)).sum(-1) - grads[1]
        return (*backward(grads[0].contiguous(), delta, q, k, v, lse, ctx.sparse), None)


def attend(q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
    """`(out, lse)`, differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Attend.apply(q, k, v, sparse)
    return forward(q, k, v, sparse)


class GatherKernel(Kernel):
    """Blocks of queries against the tokens that they chose, joined with a mask by position."""

    name = "gather"

    def efficiency(self, r: Request) -> float:
        return 0.2 if r.device == "cpu" else 0.05

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if not isinstance(m, Pairwise):
            return why
        if choice_of(m.pairs) is None:
            why.append("pairs are not one choice of keys united with masks by position")
        if m.logits:
            why.append(f"the logits part {m.logits[0].name} is not followed to chosen keys")
        if r.masked:
            why.append("a mask of single pairs is not followed to chosen keys")
        if m.tiles is not None:
            why.append("tiles were demanded, which a choice sets itself")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        form = choice_of(m.pairs)
        assert form is not None
        limit, allow, select = form
        s = r.shape
        stacks = s.batch * s.heads
        units, groups = -(-s.keys // select.size), -(-s.length // select.height)
        width = select.keep.most(units) * select.size
        positional = positional_area(limit, allow, select.size, r)
        area = stacks * (groups * select.height * width + positional)
        flops = preparation_flops(m, r) + 2 * area * (s.head_dim + s.value_dim)
        if r.grad:
            flops += 2 * area * (3 * s.head_dim + 2 * s.value_dim)
        sizes = s.head_dim + s.value_dim
        gathered = stacks * groups * width * sizes * r.item
        q, k, v, o = r.tensor_bytes()
        each = _numbers(select.height, width, sizes) * stacks
        step = min(groups, _step(each, r.device))
        slab = each * step * r.wide * (2 if r.grad else 1)
        table = 2 * stacks * min(groups, 1024) * units * r.wide
        choices = stacks * groups * select.keep.most(units) * 9
        held = o + (q + 2 * (k + v) * r.wide // r.item if r.grad else 0)
        peak = choices + max(table, held + slab) + (weight_bytes(m, r) if r.grad else 0)
        return Cost(
            flops,
            q + k + v + o + 2 * gathered * (3 if r.grad else 1) + table,
            peak,
            20 * -(-groups // step) * (3 if r.grad else 1),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        out, lse = attend(*bind(m, c))
        return out.to(r.dtype), lse
