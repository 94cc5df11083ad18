"""Softmax over chosen key blocks, united with a mask by position; cost follows the choice, gradients included.

The (query, block) pairs are sorted by block, so that every block meets its queries in dense tiles; each pair's partial
result lands in a slot of its query, and a query's slots merge with its positional part. Backward recomputes the tiles.

Legend: n = batch x heads x L rows, T choices a query, B block size, R rows of a tile, t tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels import chunk
from saccade.kernels.base import Kernel
from saccade.kernels.chunk import Band, ChunkKernel, logits, softmax_only, tile_softmax
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.logits import StaticBias
from saccade.parts.mask import Causal, Chunk, Full, Pairs, split, static_exist
from saccade.parts.pair import Context, Program
from saccade.parts.select import Blocks, TopBlocks

TILE_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 26}


@dataclass(frozen=True)
class Route:
    """Tiles of equal blocks: rows (t, R) of flat queries, -1 where unused, their slots, and each tile's flat block."""

    rows: Tensor
    slots: Tensor
    block: Tensor
    kv_block: Tensor
    bounds: list[int]


def route(chosen: Blocks, blocks: int, groups: int, tile: int) -> Route:
    """Sort the chosen (query, block) pairs by head and block, and cut them into tiles of `tile` rows."""
    b, h, length, choices = chosen.index.shape
    device = chosen.index.device
    slot = torch.arange(1, choices + 1, dtype=torch.int16, device=device)
    table = torch.zeros(b * h, length, blocks, dtype=torch.int16, device=device)
    marks = torch.where(chosen.valid, slot, 0).view(b * h, length, choices)
    table.scatter_reduce_(2, chosen.index.view(b * h, length, choices), marks, "amax")
    by_block = table.transpose(1, 2).contiguous().view(b * h * blocks, length)
    group, query = by_block.nonzero(as_tuple=True)
    slots = by_block[group, query].long() - 1
    counts = torch.bincount(group, minlength=b * h * blocks)
    tiles = (counts + tile - 1) // tile
    first = tiles.cumsum(0) - tiles
    rank = torch.arange(group.numel(), device=device) - (counts.cumsum(0) - counts)[group]
    place = first[group] * tile + rank
    total = int(tiles.sum())
    flat = group // blocks * length + query
    rows = torch.full((total * tile,), -1, dtype=torch.long, device=device)
    rows[place] = flat
    where = torch.full((total * tile,), -1, dtype=torch.long, device=device)
    where[place] = flat * choices + slots
    owner = torch.repeat_interleave(torch.arange(b * h * blocks, device=device), tiles)
    head = owner // blocks
    kv = (head // h * groups + head % h // (h // groups)) * blocks + owner % blocks
    bounds = [0, *tiles.view(b * h, blocks).sum(1).cumsum(0).tolist()]
    return Route(rows.view(total, tile), where.view(total, tile), owner % blocks, kv, bounds)


@dataclass
class Sparse:
    """All that the tile loop knows of a mechanism: the chosen blocks, the positional part and the rule between them."""

    chosen: Blocks
    limit: Pairs
    allow: Pairs | None
    band: Band | None
    tiles: tuple[int, int]
    offset: int | None
    i: Tensor
    ends: Tensor | None
    keys: int

    def whole(self) -> bool:
        """True when every pair of a chosen block exists and none is in the positional part."""
        size = self.chosen.size
        past = self.limit == Causal() and self.allow in (None, Chunk(size))
        free = self.limit == Full() and self.allow is None and self.keys % size == 0
        return self.ends is None and (past or free)

    def bias(self, rows: Tensor, block: Tensor, length: int, heads: int) -> Tensor | None:
        """Additive bias (t, R, B) of tiles, or None when every pair exists."""
        if self.whole():
            return None
        size = self.chosen.size
        batch = rows.clamp_min(0) // (length * heads)
        i = (
            self.i[batch, rows.clamp_min(0) % length]
            if self.i.shape[0] > 1
            else self.i[0, rows.clamp_min(0) % length]
        )[..., None]
        j = (block[:, None] * size + torch.arange(size, device=rows.device))[:, None]
        exist = static_exist(self.limit, i, j) & (j < self.keys)
        if self.allow is not None:
            exist = exist & ~static_exist(self.allow, i, j)
        if self.ends is not None:
            exist = exist & (j < self.ends[batch][..., None])
        return torch.where(exist, 0.0, -torch.inf)


def _tile_rows(chosen: Blocks, blocks: int) -> int:
    length, choices = chosen.index.shape[2:]
    mean = length * choices / max(1, blocks)
    return max(8, min(128, 1 << max(3, round(mean / 4).bit_length())))


def _groups(route_: Route, heads: range, size: int, device: str) -> list[slice]:
    lo, hi = route_.bounds[heads.start], route_.bounds[heads.stop]
    step = max(1, TILE_NUMBERS["cpu" if device == "cpu" else "cuda"] // (route_.rows.shape[1] * size))
    return [slice(a, min(hi, a + step)) for a in range(lo, hi, step)]


def _head_ranges(total: int, device: str) -> list[range]:
    step = 1 if device == "cpu" else total
    return [range(a, min(total, a + step)) for a in range(0, total, step)]


def _blocks(x: Tensor, size: int) -> Tensor:
    """(b, g, S, d) to (b g blocks, B, d); the last block is filled up with zeros."""
    return pad(x, (0, 0, 0, -x.shape[2] % size)).reshape(-1, size, x.shape[-1])


class Attend(torch.autograd.Function):
    """Chosen blocks and positional part as one differentiable step; saves q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
        out, lse, way = forward(q, k, v, sparse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sparse, ctx.way = sparse, way
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (out.to(lse.dtype) * grads[0].to(lse.dtype)).sum(-1) - grads[1]
        return (*backward(grads[0].contiguous(), delta, q, k, v, lse, ctx.sparse, ctx.way), None)


def forward(q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor, Route]:
    """`(out, lse, route)`."""
    b, h, length, d = q.shape
    e, size = v.shape[-1], sparse.chosen.size
    wide = torch.promote_types(q.dtype, torch.float32)
    kb, vb = _blocks(k, size), _blocks(v, size)
    blocks = kb.shape[0] // (b * k.shape[1])
    way = route(sparse.chosen, blocks, k.shape[1], _tile_rows(sparse.chosen, blocks))
    if sparse.band is not None:
        out, lse0 = chunk.forward(q, k, v, sparse.band, *sparse.tiles, need_lse=True)
        assert lse0 is not None
    else:
        out, lse0 = (
            q.new_zeros(b, h, length, e),
            torch.full((b, h, length), -torch.inf, dtype=wide, device=q.device),
        )
    flat_q, flat_out, flat_lse = q.reshape(-1, d), out.view(-1, e), lse0.view(-1)
    choices = sparse.chosen.index.shape[-1]
    for heads in _head_ranges(b * h, q.device.type):
        n = len(heads) * length
        base = heads.start * length
        parts = torch.zeros(n * choices + 1, e, dtype=wide, device=q.device)
        plse = torch.full((n * choices + 1,), -torch.inf, dtype=wide, device=q.device)
        for cut in _groups(way, heads, size, q.device.type):
            rows = way.rows[cut]
            s, vt, guard = _tile(flat_q, kb, vb, sparse, way, cut, length, h)
            p, part = tile_softmax(s, guard, True)
            assert part is not None
            where = torch.where(rows < 0, n * choices, way.slots[cut] - base * choices).view(-1)
            parts.index_copy_(0, where, torch.bmm(p.to(vt.dtype), vt).view(-1, e).to(wide))
            plse.index_copy_(0, where, part.view(-1))
        own = slice(base, base + n)
        levels = torch.cat((plse[:-1].view(n, choices), flat_lse[own, None]), 1)
        total = torch.logsumexp(levels, 1)
        shares = torch.exp(levels - torch.nan_to_num(total, neginf=0.0)[:, None])
        mixed = torch.bmm(shares[:, None, :-1], parts[:-1].view(n, choices, e)).squeeze(1)
        flat_out[own] = (mixed + shares[:, -1:] * flat_out[own]).to(q.dtype)
        flat_lse[own] = total
    return out, lse0, way


def _tile(
    flat_q: Tensor, kb: Tensor, vb: Tensor, sparse: Sparse, way: Route, cut: slice, length: int, heads: int
) -> tuple[Tensor, Tensor, bool]:
    rows = way.rows[cut]
    t, r = rows.shape
    qs = flat_q.index_select(0, rows.clamp_min(0).view(-1)).view(t, r, -1)
    kt, vt = kb.index_select(0, way.kv_block[cut]), vb.index_select(0, way.kv_block[cut])
    bias = sparse.bias(rows, way.block[cut], length, heads)
    wide = torch.promote_types(flat_q.dtype, torch.float32)
    return logits(qs, kt, None if bias is None else bias.to(wide)), vt, bias is not None


def backward(
    grad: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sparse: Sparse, way: Route
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prepared q, k and v."""
    b, h, length, d = q.shape
    e, size = v.shape[-1], sparse.chosen.size
    wide = torch.promote_types(q.dtype, torch.float32)
    kb, vb = _blocks(k, size), _blocks(v, size)
    if sparse.band is not None:
        dq, dk, dv = chunk.backward(grad, delta, q, k, v, lse, sparse.band, *sparse.tiles, whole=False)
    else:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dkb, dvb = torch.zeros_like(kb, dtype=wide), torch.zeros_like(vb, dtype=wide)
    flat_q, flat_grad, flat_dq = q.reshape(-1, d), grad.reshape(-1, e), dq.view(-1, d)
    flat_lse, flat_delta = torch.nan_to_num(lse, neginf=0.0).reshape(-1), delta.reshape(-1)
    choices = sparse.chosen.index.shape[-1]
    for heads in _head_ranges(b * h, q.device.type):
        n = len(heads) * length
        base = heads.start * length
        parts = torch.zeros(n * choices + 1, d, dtype=wide, device=q.device)
        for cut in _groups(way, heads, size, q.device.type):
            rows = way.rows[cut]
            t, r = rows.shape
            safe = rows.clamp_min(0).view(-1)
            s, vt, guard = _tile(flat_q, kb, vb, sparse, way, cut, length, h)
            p, part = tile_softmax(s, guard, True)
            assert part is not None
            factor = torch.exp(part - flat_lse[safe].view(t, r)).masked_fill_(rows < 0, 0.0)
            p.mul_(factor.unsqueeze(-1))
            gs, qs = flat_grad.index_select(0, safe).view(t, r, e), flat_q.index_select(0, safe).view(t, r, d)
            kt = kb.index_select(0, way.kv_block[cut])
            dp = torch.bmm(gs, vt.transpose(1, 2)).to(wide).sub_(flat_delta[safe].view(t, r, 1)).mul_(p)
            low, dlow = p.to(vt.dtype), dp.to(kt.dtype)
            dvb.index_add_(0, way.kv_block[cut], torch.bmm(low.transpose(1, 2), gs).to(wide))
            dkb.index_add_(0, way.kv_block[cut], torch.bmm(dlow.transpose(1, 2), qs).to(wide))
            where = torch.where(rows < 0, n * choices, way.slots[cut] - base * choices).view(-1)
            parts.index_copy_(0, where, torch.bmm(dlow, kt).view(-1, d).to(wide))
        own = slice(base, base + n)
        flat_dq[own] += parts[:-1].view(n, choices, d).sum(1).to(q.dtype)
    shape_k = (*k.shape[:2], -1)
    dk = dk + dkb.view(*shape_k, d)[:, :, : k.shape[2]].to(k.dtype)
    dv = dv + dvb.view(*shape_k, e)[:, :, : v.shape[2]].to(v.dtype)
    return dq, dk, dv


class BlockKernel(Kernel):
    """Key blocks chosen for every query, joined with a mask by position."""

    name = "block"

    def efficiency(self, r: Request) -> float:
        return 0.5 if r.device == "cpu" else 0.1

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if not isinstance(m, Pairwise):
            return why
        form = split(m.pairs)
        if form is None or len(form[2]) != 1 or not isinstance(form[2][0], TopBlocks):
            why.append("pairs are not one choice of blocks united with masks by position")
        if m.logits:
            why.append(f"the logits part {m.logits[0].name} is not followed into chosen blocks")
        if r.masked:
            why.append("a mask of single pairs is not followed into chosen blocks")
        if m.tiles is not None:
            why.append("tiles were demanded, which a choice of blocks sets itself")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        form = split(m.pairs)
        assert form is not None
        limit, allow, selects = form
        select = selects[0]
        assert isinstance(select, TopBlocks)
        s = r.shape
        blocks = -(-s.keys // select.block)
        choices = min(select.top, blocks)
        if limit.looks_back:
            first = s.keys - s.length
            chosen = sum(
                min(choices, (first + i) // select.block) for i in range(0, s.length, select.block)
            ) * min(select.block, s.length)
        else:
            chosen = s.length * choices
        stacks = s.batch * s.heads
        rows = max(8, min(128, 1 << max(3, round(s.length * choices / blocks / 4).bit_length())))
        area = stacks * (chosen + blocks * rows // 2) * select.block
        gate = 2 * stacks * s.length * blocks * s.head_dim
        flops = gate + 2 * area * (s.head_dim + s.value_dim) + 2 * stacks * chosen * s.value_dim
        if r.grad:
            flops += 2 * area * (3 * s.head_dim + 2 * s.value_dim)
        q, k, v, o = r.tensor_bytes()
        heads = 1 if r.device == "cpu" else stacks
        slots = heads * s.length * choices * (s.value_dim + s.head_dim * r.grad) * r.wide
        table = stacks * s.length * blocks * (4 + 2 + 2)
        moved = stacks * chosen * (s.head_dim + 2 * s.value_dim) * r.wide
        peak = q + o + slots + table + stacks * chosen * 32 + (q + 2 * (k + v) if r.grad else 0)
        total = Cost(
            flops,
            q + k + v + o + moved * (3 if r.grad else 1) + table,
            peak,
            200 * stacks * (3 if r.grad else 1),
        )
        if allow is None:
            return total
        return total + ChunkKernel().cost(replace(m, pairs=limit & allow), r)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        form = split(m.pairs)
        assert form is not None
        limit, allow, (select,) = form
        program = Program.bind(m, c)
        c = program.context
        chosen = program.selections[select]  # type: ignore[index]
        assert isinstance(chosen, Blocks)
        band = None
        if allow is not None:
            positional = limit & allow
            band = Band(
                positional,
                tuple(p for p in m.logits if isinstance(p, StaticBias)),
                c.q.shape[1],
                c.offset,
                c.start,
                1,
                c.ends,
                None,
                c.i,
            )
        sparse = Sparse(chosen, limit, allow, band, (64, 4096), c.offset, c.i, c.ends, program.keys)
        q, k, v = program.q, program.k, program.v
        if q.device.type == "cpu" and q.dtype.itemsize < 4:
            q, k, v = q.float(), k.float(), v.float()
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out, lse = Attend.apply(q, k, v, sparse)
        else:
            out, lse, _ = forward(q, k, v, sparse)
        return out.to(r.dtype), lse
