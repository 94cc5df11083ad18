"""Softmax over tiles of keys, for masks by position, with gradients and nothing of length x window saved.

Rows run in slabs; each slab meets only the key spans that its mask can reach, a tile at a time, and partial results
(out, lse) merge online. Backward recomputes each tile. (Rabe and Staats, Self-attention Does Not Need O(n^2) Memory,
2021; Dao et al., FlashAttention, 2022.)

Legend: N state heads (batch x key-value heads), r query heads a key-value head, Q rows and K keys of one tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.logits import StaticBias
from saccade.parts.mask import (
    And,
    Causal,
    Dilated,
    Full,
    Neighborhood,
    Pairs,
    Span,
    Strided,
    Window,
    cover,
    static_exist,
)
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Program

ALIGN = 64
CACHE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 27}


@dataclass
class Band:
    """Which tiles there are, and the additive bias of each: all that the loop knows of a mechanism."""

    pairs: Pairs
    logits: tuple[StaticBias, ...]
    heads: int
    offset: int | None
    start: int
    unit: int = 1
    ends: Tensor | None = None
    mask: Tensor | None = None
    i: Tensor | None = None
    cache: dict[tuple[int, ...], tuple[Tensor | None, bool]] = field(default_factory=dict)

    def tiles(self, r0: int, r1: int, keys: int, key_tile: int) -> list[list[Span]]:
        """Key tiles of a slab; short spans share a tile."""
        found = spans(self.pairs, self.offset, self.start, r0, r1, keys)
        if sum(hi - lo for lo, hi in found) <= key_tile:
            return [found] if found else []
        return [[(a, min(hi, a + key_tile))] for lo, hi in found for a in range(lo, hi, key_tile)]

    def bias(self, r0: int, r1: int, tile: list[Span], like: Tensor) -> tuple[Tensor | None, bool]:
        """Additive bias broadcastable to (batch, heads, Q, K), or None, and whether a row may be empty."""
        plain = self.offset is not None and self.ends is None and self.mask is None
        static = plain and self.pairs.shift_invariant and len(tile) == 1
        key = (r0 - tile[0][0], r1 - r0, tile[0][1] - tile[0][0])
        if static and key in self.cache:
            return self.cache[key]
        made = self._bias(r0, r1, tile, like)
        if static:
            self.cache[key] = made
        return made

    def _bias(self, r0: int, r1: int, tile: list[Span], like: Tensor) -> tuple[Tensor | None, bool]:
        device = like.device
        cols = torch.cat([torch.arange(lo, hi, device=device) for lo, hi in tile])
        if self.offset is None:
            assert self.i is not None
            i = self.i[:, None, r0:r1, None]
        else:
            i = (torch.arange(r0, r1, device=device) + self.offset)[:, None]
        j = (cols + self.start)[None]
        exist = None if isinstance(self.pairs, Full) else static_exist(self.pairs, i, j)
        if self.ends is not None:
            kept = (cols < self.ends[:, None])[:, None, None]
            exist = kept if exist is None else exist & kept
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., r0:r1, :]
            mask = mask if mask.shape[-1] == 1 else mask.index_select(-1, cols)
            exist = mask if exist is None else exist & mask
        bias: Tensor | None = None
        for part in self.logits:
            term = part.bias(i * self.unit, j * self.unit, self.heads).to(like.dtype)
            bias = term if bias is None else bias + term
        if exist is None or bool(exist.all()):
            return bias, False
        empty = not bool(exist.any(-1).all())
        base = torch.zeros((), dtype=like.dtype, device=device) if bias is None else bias
        return torch.where(exist, base, -torch.inf), empty


def spans(pairs: Pairs, offset: int | None, start: int, r0: int, r1: int, keys: int) -> list[Span]:
    """Aligned key spans of rows [r0, r1): cache lines of whole keys cost less than ragged edges."""
    if offset is None:
        return [(0, keys)] if keys else []
    found = cover(pairs, r0 + offset, r1 + offset, start + keys)
    out: list[Span] = []
    for lo, hi in found:
        lo, hi = max(0, lo - start), hi - start
        if hi <= lo:
            continue
        lo = lo // ALIGN * ALIGN if hi - lo > ALIGN else lo
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], hi)
        else:
            out.append((lo, hi))
    return out


def fold(x: Tensor, heads: int) -> Tensor:
    """(b, h, Q, d) to (N, r Q, d): the query heads of a group become rows."""
    return x.reshape(x.shape[0] * heads, -1, x.shape[-1])


def widen(bias: Tensor, b: int, h: int, g: int) -> Tensor:
    """Bias broadcastable to (b, h, Q, K) as one that broadcasts to (N, r Q, K)."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    rows, cols = bias.shape[-2:]
    if h == g and bias.shape[0] == bias.shape[1] == 1:
        return bias.view(1, rows, cols).expand(b * g, rows, cols)
    return bias.expand(b, h, rows, cols).reshape(b * g, h // g * rows, cols)


def tile_softmax(s: Tensor, guard: bool, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax of a tile, and its lse from the two row maxima, without a second exponential."""
    top = s.amax(-1) if need_lse or guard else None
    if not guard:
        p = torch.softmax(s, -1)
        return p, (top - p.amax(-1).log() if need_lse and top is not None else None)
    assert top is not None
    dead = torch.isneginf(top)
    p = torch.softmax(s.masked_fill(dead.unsqueeze(-1), 0.0), -1)
    lse = torch.where(dead, top, top - p.amax(-1).log()) if need_lse else None
    return p.masked_fill_(dead.unsqueeze(-1), 0.0), lse


def logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """q k^T plus the bias, (N, Q, K), accumulated in float32 or wider."""
    if q.dtype.itemsize < 4:
        s = torch.bmm(q, k.transpose(1, 2)).float()
        return s if bias is None else s.add_(bias)
    return torch.bmm(q, k.transpose(1, 2)) if bias is None else torch.baddbmm(bias, q, k.transpose(1, 2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, query_tile: int, key_tile: int, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, L, e), lse (b, h, L) float32 or wider)` of prepared q, k and v."""
    b, h, rows, _ = q.shape
    g, keys = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(b, h, rows, v.shape[-1])
    lse = torch.empty(b, h, rows, dtype=wide, device=q.device) if need_lse else None
    k, v = k.reshape(b * g, keys, -1), v.reshape(b * g, keys, -1)
    for r0 in range(0, rows, query_tile):
        r1 = min(rows, r0 + query_tile)
        qs = fold(q[:, :, r0:r1], g)
        tiles = band.tiles(r0, r1, keys, key_tile)
        acc: Tensor | None = None
        total: Tensor | None = None
        for tile in tiles:
            bias, guard = band.bias(r0, r1, tile, out if out.dtype == wide else out.new_empty(0, dtype=wide))
            kt, vt = (
                x[:, tile[0][0] : tile[0][1]]
                if len(tile) == 1
                else torch.cat([x[:, lo:hi] for lo, hi in tile], 1)
                for x in (k, v)
            )
            s = logits(qs, kt, None if bias is None else widen(bias, b, h, g))
            p, part = tile_softmax(s, guard, need_lse or len(tiles) > 1)
            o = torch.bmm(p.to(vt.dtype), vt)
            if acc is None:
                acc, total = o, part
                continue
            assert total is not None
            assert part is not None
            joint = torch.logaddexp(total, part)
            base = joint.masked_fill(torch.isneginf(joint), 0.0)
            acc = acc.to(wide).mul_(torch.exp(total - base).unsqueeze(-1))
            acc.addcmul_(o.to(wide), torch.exp(part - base).unsqueeze(-1))
            total = joint
        if acc is None:
            out[:, :, r0:r1] = 0
            if lse is not None:
                lse[:, :, r0:r1] = -torch.inf
            continue
        out[:, :, r0:r1] = acc.view(b, h, r1 - r0, -1)
        if lse is not None and total is not None:
            lse[:, :, r0:r1] = total.view(b, h, r1 - r0)
    return out, lse


def backward(
    grad: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    band: Band,
    query_tile: int,
    key_tile: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prepared q, k, v. `delta` (b, h, L) is sum(grad out) minus the gradient of lse.

    `whole` says that lse is that of the band alone, so a row with one tile needs no rescaling.
    """
    b, h, rows, _ = q.shape
    g, keys = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    k3, v3 = k.reshape(b * g, keys, -1), v.reshape(b * g, keys, -1)
    dk, dv = torch.zeros_like(k3, dtype=wide), torch.zeros_like(v3, dtype=wide)
    like = q.new_empty(0, dtype=wide)
    for r0 in range(0, rows, query_tile):
        r1 = min(rows, r0 + query_tile)
        qs, gs = fold(q[:, :, r0:r1], g), fold(grad[:, :, r0:r1], g)
        ls, ds = fold(lse[:, :, r0:r1, None], g), fold(delta[:, :, r0:r1, None], g)
        tiles = band.tiles(r0, r1, keys, key_tile)
        acc: Tensor | None = None
        for tile in tiles:
            bias, guard = band.bias(r0, r1, tile, like)
            kt, vt = (
                x[:, tile[0][0] : tile[0][1]]
                if len(tile) == 1
                else torch.cat([x[:, lo:hi] for lo, hi in tile], 1)
                for x in (k3, v3)
            )
            s = logits(qs, kt, None if bias is None else widen(bias, b, h, g))
            alone = whole and len(tiles) == 1
            p, part = tile_softmax(s, guard, not alone)
            if part is not None:
                base = ls.masked_fill(torch.isneginf(ls), 0.0)
                p.mul_(torch.exp(part.unsqueeze(-1) - base))
            low = p.to(vt.dtype)
            dp = (
                torch.bmm(gs, vt.transpose(1, 2))
                if gs.dtype.itemsize >= 4
                else torch.bmm(gs, vt.transpose(1, 2)).float()
            )
            dp.sub_(ds).mul_(p)
            dlow = dp.to(kt.dtype)
            at = 0
            for lo, hi in tile:
                cut = slice(at, at + hi - lo)
                _accumulate(dv[:, lo:hi], low[:, :, cut].transpose(1, 2), gs)
                _accumulate(dk[:, lo:hi], dlow[:, :, cut].transpose(1, 2), qs)
                at += hi - lo
            step = torch.bmm(dlow, kt)
            acc = step if acc is None else acc.add_(step)
        dq[:, :, r0:r1] = 0 if acc is None else acc.view(b, h, r1 - r0, -1)
    return dq, dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype)


def _accumulate(target: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == target.dtype:
        target.baddbmm_(a, b)
    else:
        target.add_(torch.bmm(a, b))


class Attend(torch.autograd.Function):
    """The tile loop as one differentiable step; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band, query_tile: int, key_tile: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, band, query_tile, key_tile, need_lse=True)
        assert lse is not None
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = (band, query_tile, key_tile)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, grad_lse = grads
        delta = (out.to(lse.dtype) * grad.to(lse.dtype)).sum(-1) - grad_lse
        band, query_tile, key_tile = ctx.plan
        found = backward(grad.contiguous(), delta, q, k, v, lse, band, query_tile, key_tile, whole=True)
        return (*found, None, None, None)


def softmax_only(m: Mechanism) -> list[str]:
    """Why a mechanism is not plain softmax over a factored score."""
    if not isinstance(m, Pairwise):
        return [f"runs pairwise mechanisms, this one is {m.family}"]
    why = []
    if not m.score.factored:
        why.append(f"the score {m.score.name} is no dot product of prepared vectors")
    if type(m.normalizer) is not Softmax:
        why.append(f"the normaliser is {m.normalizer.name}, not softmax")
    if m.reweight:
        why.append(f"weights are changed after the softmax by {m.reweight[0].name}")
    if m.heads is not None and m.heads.learned_query:
        why.append("a learned query has its own prefix scan")
    return why


@dataclass(frozen=True)
class Folded:
    """Residue classes of a dilated or strided mask: `step` independent sequences under a plain mask."""

    step: int
    pairs: Pairs


def folded(pairs: Pairs, r: Request) -> Folded | None:
    """The plain mask inside residue classes, where the mask has them and the call is whole self-attention."""
    if r.shifted or r.ragged or r.masked or r.decoding:
        return None
    atoms = [p for p in (pairs.parts if isinstance(pairs, And) else (pairs,)) if not isinstance(p, Causal)]
    if len(atoms) != 1:
        return None
    atom = atoms[0]
    if isinstance(atom, Dilated) and atom.step > 1:
        return Folded(atom.step, Window(atom.width))
    if isinstance(atom, Strided) and atom.step > 1:
        return Folded(atom.step, Causal())
    if isinstance(atom, Neighborhood) and atom.dilation > 1 and atom is pairs:
        return Folded(atom.dilation, Neighborhood(atom.width))
    return None


def to_classes(x: Tensor, step: int) -> Tensor:
    """(b, h, n, d) to (b step, h, ceil(n / step), d), class by class."""
    b, h, n, d = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, -n % step))
    return x.view(b, h, -1, step, d).permute(0, 3, 1, 2, 4).reshape(b * step, h, -1, d)


def from_classes(x: Tensor, step: int, n: int) -> Tensor:
    """The inverse of `to_classes`, for (b step, h, m) or (b step, h, m, d)."""
    tail = x.shape[3:]
    x = x.view(-1, step, *x.shape[1:])
    order = (0, 2, 3, 1, *range(4, x.dim()))
    return x.permute(order).reshape(x.shape[0], x.shape[2], -1, *tail)[:, :, :n]


def tile_sizes(m: Pairwise, r: Request) -> tuple[int, int]:
    """Rows and keys of a tile: as the mechanism demands, else what a cache holds."""
    if m.tiles is not None:
        return m.tiles.query, m.tiles.key
    folding = folded(m.pairs, r)
    horizon = folding.pairs.horizon if folding else m.pairs.horizon
    numbers = CACHE_NUMBERS["cpu" if r.device == "cpu" else "cuda"]
    stacks = r.shape.batch * r.shape.heads * (folding.step if folding else 1)
    if horizon is not None or isinstance(folding.pairs if folding else m.pairs, Neighborhood):
        return 64, 4096
    rows = 128 if r.device == "cpu" else 1024
    return rows, max(256, min(8192, numbers // max(1, rows * stacks) // ALIGN * ALIGN))


class ChunkKernel(Kernel):
    """Any mask by position under softmax: windows, dilations, strides, blocks, unions; gradients anywhere."""

    name = "chunk"

    def efficiency(self, r: Request) -> float:
        return 0.9 if r.device == "cpu" else 0.15

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if isinstance(m, Pairwise):
            if not m.static:
                why.append("pairs are chosen by content")
            why += [
                f"the logits part {p.name} is not fixed by position"
                for p in m.logits
                if not isinstance(p, StaticBias)
            ]
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        return _cost(m, r)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        query_tile, key_tile = tile_sizes(m, r)
        folding = folded(m.pairs, r)
        program = Program.bind(m, c)
        q, k, v = program.q, program.k, program.v
        c = program.context
        biases = tuple(p for p in m.logits if isinstance(p, StaticBias))
        keys = r.shape.keys
        if folding is not None:
            ends = None
            if isinstance(folding.pairs, Neighborhood) and keys % folding.step:
                ends = torch.tensor(
                    [-(-(keys - at) // folding.step) for at in range(folding.step)] * q.shape[0],
                    device=q.device,
                )
            q, k, v = (to_classes(x, folding.step) for x in (q, k, v))
            band = Band(folding.pairs, biases, q.shape[1], 0, 0, folding.step, ends)
        else:
            summarised = m.summary is not None
            band = Band(
                m.pairs, biases, q.shape[1], c.offset, c.start, 1, None if summarised else c.ends, c.mask
            )
            band.i = c.i if c.offset is None else None
        if q.device.type == "cpu" and q.dtype.itemsize < 4:
            q, k, v = q.float(), k.float(), v.float()
        out, lse = attend(q, k, v, band, query_tile, key_tile, r.lse)
        if folding is not None:
            out = from_classes(out, folding.step, keys)
            lse = None if lse is None else from_classes(lse, folding.step, keys)
        return out.to(r.dtype), lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, band: Band, query_tile: int, key_tile: int, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The tile loop, differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attend.apply(q, k, v, band, query_tile, key_tile)
        return out, lse
    return forward(q, k, v, band, query_tile, key_tile, need_lse)


@functools.lru_cache(maxsize=512)
def tile_area(pairs: Pairs, rows: int, keys: int, query_tile: int, key_tile: int) -> tuple[int, int, int]:
    """Pairs computed (whole tiles), the largest tile, and the number of tiles, of one head."""
    band = Band(pairs, (), 1, keys - rows, 0)
    area = largest = count = 0
    for r0 in range(0, rows, query_tile):
        r1 = min(rows, r0 + query_tile)
        for tile in band.tiles(r0, r1, keys, key_tile):
            size = (r1 - r0) * sum(hi - lo for lo, hi in tile)
            area, largest, count = area + size, max(largest, size), count + 1
    return area, largest, count


def _cost(m: Pairwise, r: Request) -> Cost:
    s = r.shape
    query_tile, key_tile = tile_sizes(m, r)
    folding = folded(m.pairs, r)
    step, pairs = (folding.step, folding.pairs) if folding else (1, m.pairs)
    keys = m.summary.rows(s.keys) if m.summary is not None else s.keys
    rows, keys = -(-s.length // step), -(-keys // step)
    area, largest, count = tile_area(pairs, rows, keys, query_tile, key_tile)
    stacks = s.batch * s.heads * step
    forward_flops = 2 * stacks * area * (s.head_dim + s.value_dim)
    back_flops = 2 * stacks * area * (3 * s.head_dim + 2 * s.value_dim)
    q, k, v, o = r.tensor_bytes()
    numbers = stacks * rows
    widened = 0 if r.item >= 4 or r.device != "cpu" else 2 * (q + k + v + o)
    copies = (q + k + v + o) if folding else 0
    scaled = q
    tile_bytes = stacks * largest * r.wide
    stat = numbers * r.wide
    kept = scaled + copies + widened + o
    if not r.grad:
        peak = kept + 2 * tile_bytes + (stat if r.lse else 0)
        return Cost(forward_flops, q + k + v + o + stacks * area * r.wide, peak, 6 * count)
    wide_grads = (k + v) * r.wide // r.item
    peak = kept + 2 * stat + q + wide_grads + 3 * tile_bytes
    return Cost(
        forward_flops + back_flops, 3 * (q + k + v + o) + 3 * stacks * area * r.wide, peak, 20 * count
    )
