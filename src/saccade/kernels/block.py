"""Softmax over chosen key blocks, united with a mask by position; cost follows the choice, gradients included.

The (query, block) pairs are sorted by block, so that every block meets its queries in dense tiles; each pair's partial
result lands in a slot of its query, and a query's slots merge with its positional part. Backward recomputes the tiles.

Legend: n = batch x heads x L rows, T choices a query, B block size, R rows of a tile, t tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels import band
from saccade.kernels.band import Band, logits, tile_softmax
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.chunk import softmax_only, tile_area
from saccade.kernels.fold import Fold
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full, Pairs, static_exist
from saccade.parts.mask import Causal, Chunk
from saccade.parts.pair import Context, Program
from saccade.parts.select import Choice, TopBlocks, choice_of
from saccade.parts.selection import Blocks

TILES = (64, 4096)
TILE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class Route:
    """Tiles of equal blocks: rows (t, R) of flat queries and used (t, R), the slot of each row's partial result, the
    block of each tile and its flat key-value block, and where the tiles of each head begin."""

    rows: Tensor
    used: Tensor
    slots: Tensor
    block: Tensor
    kv_block: Tensor
    bounds: list[int]


def route(chosen: Blocks, blocks: int, groups: int, tile: int) -> Route:
    """Sort the chosen (query, block) pairs by head and block, and cut them into tiles of `tile` rows.

    The slot of the t-th choice of row i of a head is t n + i, so that a head's slots merge choice by choice.
    """
    b, h, length, choices = chosen.index.shape
    device = chosen.index.device
    heads = torch.arange(b * h, device=device).view(b, h, 1, 1)
    keys = torch.where(chosen.valid, heads * blocks + chosen.index, b * h * blocks)
    group, order = keys.transpose(2, 3).reshape(-1).sort(stable=True)
    group, order = group[: (count := int(chosen.valid.sum()))], order[:count]
    counts = torch.bincount(group, minlength=b * h * blocks)
    tiles = (counts + tile - 1) // tile
    first = tiles.cumsum(0) - tiles
    place = first[group] * tile + torch.arange(count, device=device) - (counts.cumsum(0) - counts)[group]
    total = int(tiles.sum())
    rows = torch.zeros(total * tile, dtype=torch.long, device=device)
    rows[place] = group // blocks * length + order % length
    slots = torch.full((total * tile,), choices * length, dtype=torch.long, device=device)
    slots[place] = order % (choices * length)
    used = torch.zeros(total * tile, dtype=torch.bool, device=device)
    used[place] = True
    owner = torch.repeat_interleave(torch.arange(b * h * blocks, device=device), tiles)
    head = owner // blocks
    kv = (head // h * groups + head % h // (h // groups)) * blocks + owner % blocks
    bounds = [0, *tiles.view(b * h, blocks).sum(1).cumsum(0).tolist()]
    shape = (total, tile)
    return Route(rows.view(shape), used.view(shape), slots.view(shape), owner % blocks, kv, bounds)


@dataclass
class Sparse:
    """All that the tile loop knows of a mechanism: the chosen blocks, the positional part and the rule between them."""

    chosen: Blocks
    limit: Pairs
    allow: Pairs | None
    i: Tensor
    offset: int | None
    start: int
    ends: Tensor | None
    keys: int

    def _band(self, heads: int) -> tuple[Band | None, Fold | None]:
        """The positional part as a band, or as blocks that never meet."""
        if self.allow is None:
            return None, None
        size = self.chosen.size
        rows = self.i.shape[1]
        if (
            self.limit == Causal()
            and self.allow == Chunk(size)
            and self.ends is None
            and rows == self.keys
            and not rows % size
        ):
            return Band(Causal(), (), heads * rows // size, 0, 0), Fold(rows // size, Causal(), blocks=True)
        i = self.i if self.offset is None else None
        return Band(self.limit & self.allow, (), heads, self.offset, self.start, self.ends, None, i), None

    def positional(self, q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(out, lse)` of the pairs that position alone allows."""
        b, h, n, _ = q.shape
        g = k.shape[1]
        found, fold = self._band(h)
        if found is None:
            empty = torch.full((b, h, n), -torch.inf, dtype=wide, device=q.device)
            return torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype, device=q.device), empty
        if fold is not None:
            q, k, v = fold.into(q, g), fold.into(k, g), fold.into(v, g)
        out, lse = band.forward(q, k, v, found, *TILES, need_lse=True)
        assert lse is not None
        if fold is not None:
            out, lse = fold.back(out, h, g, n), fold.back(lse.unsqueeze(-1), h, g, n).squeeze(-1)
        return out.contiguous(), lse.contiguous()

    def positional_back(
        self, grad: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v through the positional pairs, given the lse of all pairs."""
        h, n, g = q.shape[1], q.shape[2], k.shape[1]
        found, fold = self._band(h)
        if found is None:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if fold is None:
            return band.backward(grad, delta, q, k, v, lse, found, *TILES, whole=False)
        q, k, v, grad = (fold.into(x, g) for x in (q, k, v, grad))
        delta, lse = (fold.into(x.unsqueeze(-1), g).squeeze(-1) for x in (delta, lse))
        grads = band.backward(grad, delta, q, k, v, lse, found, *TILES, whole=False)
        dq, dk, dv = (fold.back(x, heads, g, n) for x, heads in zip(grads, (h, g, g), strict=True))
        return dq.contiguous(), dk, dv

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
        batch = rows // (length * heads)
        i = self.i[batch if self.i.shape[0] > 1 else 0, rows % length][..., None]
        j = (block[:, None] * size + torch.arange(size, device=rows.device))[:, None]
        exist = static_exist(self.limit, i, j) & (j < self.keys)
        if self.allow is not None:
            exist = exist & ~static_exist(self.allow, i, j)
        if self.ends is not None:
            exist = exist & (j < self.ends[batch][..., None])
        return torch.where(exist, 0.0, -torch.inf)


def _tile_rows(chosen: Blocks, blocks: int) -> int:
    length, choices = chosen.index.shape[2:]
    return _tile_height(length * choices / max(1, blocks))


def _tile_height(mean: float) -> int:
    """Rows of a tile where blocks are chosen by `mean` rows."""
    return max(8, min(128, 1 << max(3, round(mean / 4).bit_length())))


def _groups(way: Route, head: int, size: int, device: str) -> list[slice]:
    lo, hi = way.bounds[head], way.bounds[head + 1]
    step = max(1, TILE_NUMBERS["cpu" if device == "cpu" else "cuda"] // (way.rows.shape[1] * size))
    return [slice(a, min(hi, a + step)) for a in range(lo, hi, step)]


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


def attend(q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
    """`(out, lse)`, differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Attend.apply(q, k, v, sparse)
    return forward(q, k, v, sparse)[:2]


def forward(q: Tensor, k: Tensor, v: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor, Route]:
    """`(out, lse, route)`."""
    b, h, length, d = q.shape
    e, size = v.shape[-1], sparse.chosen.size
    wide = torch.promote_types(q.dtype, torch.float32)
    kb, vb = _blocks(k, size), _blocks(v, size)
    blocks = kb.shape[0] // (b * k.shape[1])
    way = route(sparse.chosen, blocks, k.shape[1], _tile_rows(sparse.chosen, blocks))
    out, lse = sparse.positional(q, k, v, wide)
    flat_q, flat_out, flat_lse = q.reshape(-1, d), out.view(b * h, length, e), lse.view(b * h, length)
    choices = sparse.chosen.index.shape[-1]
    parts = torch.zeros(choices * length + 1, e, dtype=wide, device=q.device)
    levels = torch.empty(choices * length + 1, dtype=wide, device=q.device)
    for head in range(b * h):
        levels.fill_(-torch.inf)
        for cut in _groups(way, head, size, q.device.type):
            s, vt, guard = _tile(flat_q, kb, vb, sparse, way, cut, length, h)
            p, part = tile_softmax(s, guard, True)
            assert part is not None
            where = way.slots[cut].view(-1)
            parts.index_copy_(0, where, torch.bmm(p.to(vt.dtype), vt).view(-1, e).to(wide))
            levels.index_copy_(0, where, part.reshape(-1))
        each = torch.cat((levels[:-1].view(choices, length), flat_lse[head, None]))
        total = torch.logsumexp(each, 0)
        shares = torch.exp(each - torch.nan_to_num(total, neginf=0.0)).unsqueeze(-1)
        mixed = flat_out[head].to(wide) * shares[-1]
        for t in range(choices):
            mixed.addcmul_(parts[t * length : (t + 1) * length], shares[t])
        flat_out[head], flat_lse[head] = mixed.to(q.dtype), total
    return out, lse, way


def _tile(
    flat_q: Tensor, kb: Tensor, vb: Tensor, sparse: Sparse, way: Route, cut: slice, length: int, heads: int
) -> tuple[Tensor, Tensor, bool]:
    rows = way.rows[cut]
    qs = flat_q.index_select(0, rows.view(-1)).view(*rows.shape, -1)
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
    dq, dk, dv = sparse.positional_back(grad, delta, q, k, v, lse)
    dkb, dvb = torch.zeros_like(kb, dtype=wide), torch.zeros_like(vb, dtype=wide)
    flat_q, flat_grad, flat_dq = q.reshape(-1, d), grad.reshape(-1, e), dq.view(b * h, length, d)
    flat_lse, flat_delta = torch.nan_to_num(lse, neginf=0.0).reshape(-1), delta.reshape(-1)
    choices = sparse.chosen.index.shape[-1]
    parts = torch.zeros(choices * length + 1, d, dtype=wide, device=q.device)
    for head in range(b * h):
        for cut in _groups(way, head, size, q.device.type):
            rows, blocks = way.rows[cut], way.kv_block[cut]
            t, r = rows.shape
            flat = rows.view(-1)
            s, vt, guard = _tile(flat_q, kb, vb, sparse, way, cut, length, h)
            p, part = tile_softmax(s, guard, True)
            assert part is not None
            factor = torch.exp(part - flat_lse[flat].view(t, r)).masked_fill_(~way.used[cut], 0.0)
            p.mul_(factor.unsqueeze(-1))
            gs, qs = flat_grad.index_select(0, flat).view(t, r, e), flat_q.index_select(0, flat).view(t, r, d)
            dp = torch.bmm(gs, vt.transpose(1, 2)).to(wide).sub_(flat_delta[flat].view(t, r, 1)).mul_(p)
            low, dlow = p.to(vt.dtype), dp.to(kb.dtype)
            dvb.index_add_(0, blocks, torch.bmm(low.transpose(1, 2), gs).to(wide))
            dkb.index_add_(0, blocks, torch.bmm(dlow.transpose(1, 2), qs).to(wide))
            step = torch.bmm(dlow, kb.index_select(0, blocks)).view(-1, d)
            parts.index_copy_(0, way.slots[cut].view(-1), step.to(wide))
        taken = sparse.chosen.valid.view(b * h, length, choices)[head]
        for t in range(choices):
            flat_dq[head] += (
                parts[t * length : (t + 1) * length].masked_fill(~taken[:, t, None], 0).to(q.dtype)
            )
    shape_k = (*k.shape[:2], -1)
    dk = dk + dkb.view(*shape_k, d)[:, :, : k.shape[2]].to(k.dtype)
    dv = dv + dvb.view(*shape_k, e)[:, :, : v.shape[2]].to(v.dtype)
    return dq, dk, dv


def chosen_rows(select: Choice, limit: Pairs, rows: int, keys: int) -> tuple[int, int]:
    """Rows that choose a block, summed over the blocks of a head, and the rows of their tiles, for even choices."""
    size, blocks = select.size, -(-keys // select.size)
    choices = select.keep.most(blocks)
    height = _tile_height(rows * choices / max(1, blocks))
    counts, later = [rows * choices / max(1, blocks)] * blocks, 0.0
    for own in reversed(range(blocks if limit.looks_back else 0)):
        counts[own] = later
        i = range(max(keys - rows, own * size), min(keys, (own + 1) * size))
        later += len(i) * min(choices, own) / max(1, own)
    tiled = sum(c + height / 2 for c in counts if c)
    return round(sum(counts)), round(tiled)


def positional_area(limit: Pairs, allow: Pairs | None, size: int, r: Request) -> int:
    """Pairs that the positional part computes for a head."""
    s = r.shape
    if allow is None:
        return 0
    if limit == Causal() and allow == Chunk(size) and not (r.ragged or r.shifted or s.length % size):
        return s.length // size * tile_area(Causal(), size, size, *TILES)[0]
    return tile_area(limit & allow, s.length, s.keys, *TILES)[0]


def bind(m: Pairwise, c: Context) -> tuple[Tensor, Tensor, Tensor, Sparse]:
    """Prepared q, k and v, in float32 or wider on a CPU, and what was chosen for them under which masks."""
    form = choice_of(m.pairs)
    assert form is not None
    limit, allow, select = form
    program = Program.bind(m, c)
    c, chosen = program.context, program.selections[select]
    assert isinstance(chosen, Blocks)
    sparse = Sparse(chosen, limit, allow, c.i, c.offset, c.start, c.ends, program.keys)
    q, k, v = program.q, program.k, program.v
    if q.device.type == "cpu" and q.dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    return q, k, v, sparse


class BlockKernel(Kernel):
    """Key blocks chosen for every query, joined with a mask by position."""

    name = "block"

    def efficiency(self, r: Request) -> float:
        return 0.5 if r.device == "cpu" else 0.1

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if not isinstance(m, Pairwise):
            return why
        form = choice_of(m.pairs)
        if form is None or not isinstance(form[2], TopBlocks):
            why.append("pairs are not one choice of blocks united with masks by position")
        elif form[2].rows > 1:
            why.append("blocks of queries share their choice")
        if m.logits:
            why.append(f"the logits part {m.logits[0].name} is not followed into chosen blocks")
        if r.masked:
            why.append("a mask of single pairs is not followed into chosen blocks")
        if m.tiles is not None:
            why.append("tiles were demanded, which a choice of blocks sets itself")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        form = choice_of(m.pairs)
        assert form is not None
        limit, allow, select = form
        s = r.shape
        blocks = -(-s.keys // select.size)
        choices = select.keep.most(blocks)
        stacks = s.batch * s.heads
        chosen, tiled = chosen_rows(select, limit, s.length, s.keys)
        positional = positional_area(limit, allow, select.size, r)
        area = stacks * (tiled * select.size + positional)
        flops = 2 * area * (s.head_dim + s.value_dim) + preparation_flops(m, r)
        if r.grad:
            flops += 2 * area * (3 * s.head_dim + 2 * s.value_dim)
        q, k, v, o = r.tensor_bytes()
        table = 2 * stacks * s.length * blocks * r.wide
        moved = stacks * chosen * (s.head_dim + 2 * s.value_dim) * r.wide
        height = _tile_height(s.length * choices / max(1, blocks))
        pairs = min(TILE_NUMBERS["cpu" if r.device == "cpu" else "cuda"], tiled * select.size)
        each = (s.head_dim + s.value_dim) * (pairs // select.size + pairs // height)
        tile = (5 * pairs + 2 * each if r.grad else 2 * pairs + each) * r.wide
        slots = choices * s.length * (s.head_dim if r.grad else s.value_dim) * r.wide
        index = stacks * (17 * tiled + 9 * s.length * choices)
        wide = r.wide // r.item if r.device == "cpu" else 1
        held = (q + k + v + o) * wide + (q + 2 * (k + v) if r.grad else 0) * wide
        peak = max(table, held + slots + tile + index) + (weight_bytes(m, r) if r.grad else 0)
        return Cost(
            flops,
            q + k + v + o + moved * (3 if r.grad else 1) + table + stacks * positional * r.wide,
            peak,
            200 * stacks * (3 if r.grad else 1),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        out, lse = attend(*bind(m, c))
        return out.to(r.dtype), lse
