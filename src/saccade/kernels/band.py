"""Softmax over tiles of keys: the loop, with gradients, that saves q, k, v, out and lse and nothing of length x keys.

Rows run in slabs; each slab meets only the key spans that its mask can reach, a tile at a time, and partial results
(out, lse) merge online. Backward recomputes each tile. (Rabe and Staats, Self-attention Does Not Need O(n^2) Memory,
2021; Dao et al., FlashAttention, 2022.)

Legend: N stacks (batch x key-value heads), r query heads a key-value head, Q rows and K keys of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.parts.algebra import Full, Pairs, Span, cover, static_exist
from saccade.parts.logits import StaticBias
from saccade.parts.mask import rows_exist

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
    ends: Tensor | None = None
    mask: Tensor | None = None
    i: Tensor | None = None
    cache: dict[tuple[int, ...], tuple[Tensor | None, bool]] = field(default_factory=dict)

    def reach(self, r0: int, r1: int, keys: int) -> list[Span]:
        """Key spans of a slab."""
        return spans(self.pairs, self.offset, self.start, r0, r1, keys)

    def tiles(self, r0: int, r1: int, keys: int, key_tile: int) -> list[list[Span]]:
        """Key tiles of a slab; short spans share a tile."""
        found = self.reach(r0, r1, keys)
        if sum(hi - lo for lo, hi in found) <= key_tile:
            return [found] if found else []
        return [[(a, min(hi, a + key_tile))] for lo, hi in found for a in range(lo, hi, key_tile)]

    def bias(
        self, r0: int, r1: int, tile: list[Span], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, bool]:
        """Additive bias broadcastable to (batch, heads, Q, K), or None, and whether a row may be empty."""
        plain = self.offset is not None and self.ends is None and self.mask is None
        static = plain and self.pairs.shift_invariant and len(tile) == 1
        key = (r0 - tile[0][0], r1 - r0, tile[0][1] - tile[0][0])
        if static and key in self.cache:
            return self.cache[key]
        made = self._bias(r0, r1, tile, device, dtype)
        if static:
            self.cache[key] = made
        return made

    def _bias(
        self, r0: int, r1: int, tile: list[Span], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, bool]:
        cols = torch.cat([torch.arange(lo, hi, device=device) for lo, hi in tile])
        if self.offset is None:
            assert self.i is not None
            i = self.i[:, None, r0:r1, None]
        else:
            i = (torch.arange(r0, r1, device=device) + self.offset)[:, None]
        j = (cols + self.start)[None]
        if isinstance(self.pairs, Full):
            exist = None
        elif self.offset is None:
            exist = static_exist(self.pairs, i, j)
        else:
            exist = rows_exist(self.pairs, i, j, r0 + self.offset, r1 + self.offset)
        if self.ends is not None:
            kept = (cols < self.ends[:, None])[:, None, None]
            exist = kept if exist is None else exist & kept
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., r0:r1, :]
            mask = mask if mask.shape[-1] == 1 else mask.index_select(-1, cols)
            exist = mask if exist is None else exist & mask
        bias: Tensor | None = None
        for part in self.logits:
            term = part.bias(i, j, self.heads, dtype)
            bias = term if bias is None else bias + term
        if exist is None or bool(exist.all()):
            return bias, False
        empty = not bool(exist.any(-1).all())
        base = torch.zeros((), dtype=dtype, device=device) if bias is None else bias
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


def fold(x: Tensor, stacks: int) -> Tensor:
    """(b, h, L, d) to (N, r, L, d): the query heads of a group stay together."""
    b, h, rows, d = x.shape
    return x.reshape(stacks, b * h // max(1, stacks), rows, d)


def widen(bias: Tensor, stacks: int, heads: int, batch: int, rows: int) -> Tensor:
    """Bias broadcastable to (b, h, Q, K) as one that broadcasts to (N, r Q, K); `heads` is b h."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    cols = bias.shape[-1]
    group = heads // stacks
    if bias.shape[0] == bias.shape[1] == 1:
        bias = bias[0, 0].expand(rows, cols)
        return (
            bias.expand(stacks, rows, cols) if group == 1 else bias.repeat(group, 1).expand(stacks, -1, cols)
        )
    return bias.expand(batch, heads // batch, rows, cols).reshape(stacks, group * rows, cols)


def tile_softmax(s: Tensor, guard: bool, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax of a tile, and its lse without a second exponential: from one column, or from the row maxima.

    With `guard`, rows may have no key at all. In any row s_j - log p_j is the lse, as long as p_j is a normal number.
    """
    if not guard:
        p = torch.softmax(s, -1)
        if not need_lse:
            return p, None
        if s.device.type == "cpu" and bool(p[..., 0].amin() > 1e-30):
            return p, s[..., 0] - p[..., 0].log()
        return p, s.amax(-1) - p.amax(-1).log()
    top = s.amax(-1)
    dead = torch.isneginf(top)
    p = torch.softmax(s.masked_fill(dead.unsqueeze(-1), 0.0), -1)
    lse = torch.where(dead, top, top - p.amax(-1).log()) if need_lse else None
    return p.masked_fill_(dead.unsqueeze(-1), 0.0), lse


def logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """q k^T plus the bias, (N, Q, K), in float32 or wider."""
    if q.dtype.itemsize < 4:
        s = torch.bmm(q, k.transpose(1, 2)).float()
        return s if bias is None else s.add_(bias)
    return torch.bmm(q, k.transpose(1, 2)) if bias is None else torch.baddbmm(bias, q, k.transpose(1, 2))


def pick(x: Tensor, tile: list[Span]) -> Tensor:
    """The keys of a tile, of x (N, S, d)."""
    if len(tile) == 1:
        return x[:, tile[0][0] : tile[0][1]]
    return torch.cat([x[:, lo:hi] for lo, hi in tile], 1)


def stack_groups(
    band: Band, stacks: int, group: int, rows: int, query_tile: int, key_tile: int, keys: int, device: str
) -> list[slice]:
    """Stacks that run together: as many as leave one tile in cache, all of them where the bias differs between them."""
    if band.mask is not None or band.ends is not None or band.logits or band.offset is None or not stacks:
        return [slice(0, stacks)]
    last = max(0, rows - query_tile)
    widest = max(
        hi - lo
        for r0 in (0, last // 2, last)
        for lo, hi in [(0, 1), *band.reach(r0, min(rows, r0 + query_tile), keys)]
    )
    size = group * min(rows, query_tile) * min(key_tile, widest)
    step = max(1, CACHE_NUMBERS["cpu" if device == "cpu" else "cuda"] // max(1, size))
    return [slice(a, min(stacks, a + step)) for a in range(0, stacks, step)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, query_tile: int, key_tile: int, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, L, e), lse (b, h, L) float32 or wider)` of prepared q, k and v."""
    b, h, rows, _ = q.shape
    g, keys = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(b, h, rows, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, rows, dtype=wide, device=q.device) if need_lse else None
    q4, out4 = fold(q, b * g), out.view(b * g, h // g, rows, -1)
    lse4 = None if lse is None else lse.view(b * g, h // g, rows)
    k3, v3 = k.reshape(b * g, keys, -1), v.reshape(b * g, keys, -1)
    for cut in stack_groups(band, b * g, h // g, rows, query_tile, key_tile, keys, q.device.type):
        batch = b if cut.stop - cut.start == b * g else 1
        for r0 in range(0, rows, query_tile):
            r1 = min(rows, r0 + query_tile)
            acc, total = _slab(
                q4[cut, :, r0:r1], k3[cut], v3[cut], band, r0, r1, key_tile, need_lse, batch, wide
            )
            shape = (-1, h // g, r1 - r0)
            out4[cut, :, r0:r1] = 0 if acc is None else acc.view(*shape, acc.shape[-1])
            if lse4 is not None:
                lse4[cut, :, r0:r1] = -torch.inf if total is None else total.view(shape)
    return out, lse


def _slab(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    r0: int,
    r1: int,
    key_tile: int,
    need_lse: bool,
    batch: int,
    wide: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """`(out, lse)` of rows q (N, r, Q, d) over all tiles that they reach; None where they reach no key."""
    stacks, group = q.shape[:2]
    qs = q.reshape(stacks, -1, q.shape[-1])
    tiles = band.tiles(r0, r1, k.shape[1], key_tile)
    acc: Tensor | None = None
    total: Tensor | None = None
    for tile in tiles:
        bias, guard = band.bias(r0, r1, tile, q.device, wide)
        vt = pick(v, tile)
        s = logits(
            qs, pick(k, tile), None if bias is None else widen(bias, stacks, stacks * group, batch, r1 - r0)
        )
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
    return acc, total


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
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q4, g4, dq4 = fold(q, b * g), fold(grad, b * g), dq.view(b * g, h // g, rows, -1)
    ls, ds = fold(lse.unsqueeze(-1), b * g), fold(delta.unsqueeze(-1), b * g)
    k3, v3 = k.reshape(b * g, keys, -1), v.reshape(b * g, keys, -1)
    dk, dv = (
        torch.zeros(k3.shape, dtype=wide, device=k.device),
        torch.zeros(v3.shape, dtype=wide, device=v.device),
    )
    for cut in stack_groups(band, b * g, h // g, rows, query_tile, key_tile, keys, q.device.type):
        batch = b if cut.stop - cut.start == b * g else 1
        for r0 in range(0, rows, query_tile):
            at = (cut, slice(None), slice(r0, min(rows, r0 + query_tile)))
            step = _slab_back(
                g4[at],
                ds[at],
                ls[at],
                q4[at],
                k3[cut],
                v3[cut],
                dk[cut],
                dv[cut],
                band,
                r0,
                at[2].stop,
                key_tile,
                whole,
                batch,
            )
            dq4[at] = 0 if step is None else step.view(-1, h // g, at[2].stop - r0, step.shape[-1])
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _slab_back(
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    band: Band,
    r0: int,
    r1: int,
    key_tile: int,
    whole: bool,
    batch: int,
) -> Tensor | None:
    """The gradient of rows q (N, r, Q, d); those of their keys and values are added to dk and dv."""
    stacks, group = q.shape[:2]
    qs, gs, ls, ds = (x.reshape(stacks, -1, x.shape[-1]) for x in (q, grad, lse, delta))
    tiles = band.tiles(r0, r1, k.shape[1], key_tile)
    acc: Tensor | None = None
    for tile in tiles:
        bias, guard = band.bias(r0, r1, tile, q.device, dk.dtype)
        kt, vt = pick(k, tile), pick(v, tile)
        s = logits(qs, kt, None if bias is None else widen(bias, stacks, stacks * group, batch, r1 - r0))
        p, part = tile_softmax(s, guard, not (whole and len(tiles) == 1))
        if part is not None:
            base = ls.masked_fill(torch.isneginf(ls), 0.0)
            p.mul_(torch.exp(part.unsqueeze(-1) - base))
        low = p.to(vt.dtype)
        dp = torch.bmm(gs, vt.transpose(1, 2)).to(dk.dtype).sub_(ds).mul_(p)
        dlow = dp.to(kt.dtype)
        first = 0
        for lo, hi in tile:
            cut = slice(first, first + hi - lo)
            accumulate(dv[:, lo:hi], low[:, :, cut].transpose(1, 2), gs)
            accumulate(dk[:, lo:hi], dlow[:, :, cut].transpose(1, 2), qs)
            first += hi - lo
        step = torch.bmm(dlow, kt)
        acc = step if acc is None else acc.add_(step)
    return acc


def accumulate(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a b, in the dtype of the target."""
    if a.dtype == target.dtype:
        torch.baddbmm(target, a, b, out=target)
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, band: Band, query_tile: int, key_tile: int, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The tile loop, differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attend.apply(q, k, v, band, query_tile, key_tile)
        return out, lse
    return forward(q, k, v, band, query_tile, key_tile, need_lse)
