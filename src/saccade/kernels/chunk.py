"""Any mask by position under softmax, in tiles that follow the mask."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.band import ALIGN, CACHE_NUMBERS, Band, attend
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.fold import Fold, fold_of
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Pairs, static_exist
from saccade.parts.logits import StaticBias
from saccade.parts.mask import Neighborhood
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Program


def softmax_only(m: Mechanism) -> list[str]:
    """Why a mechanism is not plain softmax over a factored score."""
    if not isinstance(m, Pairwise):
        return [f"runs pairwise mechanisms, this one is {m.family}"]
    why = []
    if m.pairs.by_head:
        why.append("pairs differ between heads")
    if not m.score.factored:
        why.append(f"the score {m.score.name} is no dot product of prepared vectors")
    if type(m.normalizer) is not Softmax:
        why.append(f"the normaliser is {m.normalizer.name}, not softmax")
    if m.reweight:
        why.append(f"weights are changed after the softmax by {m.reweight[0].name}")
    if m.value:
        why.append(f"{m.value[0].name} mixes a term that every pair brings")
    if m.heads is not None and m.heads.learned_query:
        why.append("a learned query has its own prefix scan")
    return why


def folding(m: Pairwise, r: Request) -> Fold | None:
    """How the mask of a mechanism falls apart; a bias or demanded tiles keep it whole."""
    return None if m.logits or m.tiles is not None or m.summary is not None else fold_of(m.pairs, r)


def tile_sizes(m: Pairwise, r: Request) -> tuple[int, int]:
    """Rows and keys of a tile: as the mechanism demands, else what a cache holds."""
    if m.tiles is not None:
        return m.tiles.query, m.tiles.key
    fold = folding(m, r)
    pairs = fold.pairs if fold else m.pairs
    if fold is not None and fold.blocks:
        return 128, 4096
    if pairs.horizon is not None or isinstance(pairs, Neighborhood):
        return (64, 4096) if r.device == "cpu" else (512, 8192)
    numbers = CACHE_NUMBERS["cpu" if r.device == "cpu" else "cuda"]
    grain = max((n for p in pairs.leaves() if (n := getattr(p, "grain", None))), default=None)
    rows = 128 if r.device == "cpu" else 1024
    rows = rows if grain is None else min(rows, -(-32 // grain) * grain)
    stacks = min(r.shape.batch * r.shape.heads, 8)
    return rows, max(256, min(8192, numbers // max(1, rows * stacks) // ALIGN * ALIGN))


class ChunkKernel(Kernel):
    """Any mask by position under softmax: windows, dilations, strides, blocks, unions; gradients anywhere."""

    name = "chunk"

    def efficiency(self, r: Request) -> float:
        return 0.55 if r.device == "cpu" else 0.15

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
        fold = folding(m, r)
        program = Program.bind(m, c)
        c, q, k, v = program.context, program.q, program.k, program.v
        if q.device.type == "cpu" and q.dtype.itemsize < 4:
            q, k, v = q.float(), k.float(), v.float()
        if fold is not None:
            h, g, n = q.shape[1], k.shape[1], q.shape[2]
            q, k, v = fold.into(q, g), fold.into(k, g), fold.into(v, g)
            out, lse = attend(q, k, v, Band(fold.pairs, (), q.shape[1], 0, 0), query_tile, key_tile, r.lse)
            out = fold.back(out, h, g, n)
            lse = None if lse is None else fold.back(lse.unsqueeze(-1), h, g, n).squeeze(-1)
            return out.to(r.dtype), lse
        biases = tuple(p for p in m.logits if isinstance(p, StaticBias))
        ends = None if m.summary is not None else c.ends
        band = Band(
            m.pairs, biases, q.shape[1], c.offset, c.start, ends, c.mask, c.i if c.offset is None else None
        )
        out, lse = attend(q, k, v, band, query_tile, key_tile, r.lse)
        return out.to(r.dtype), lse


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


@functools.lru_cache(maxsize=512)
def bias_numbers(pairs: Pairs, logits: bool, rows: int, keys: int, query_tile: int, key_tile: int) -> int:
    """Numbers in the biases that a band keeps, of one head: one a diagonal, where a tile needs one at all."""
    if not pairs.shift_invariant:
        return 0
    offset, kept = keys - rows, dict[tuple[int, ...], int]()
    band = Band(pairs, (), 1, offset, 0)
    for r0 in range(0, rows, query_tile):
        r1 = min(rows, r0 + query_tile)
        for tile in band.tiles(r0, r1, keys, key_tile):
            lo, hi = tile[0]
            key = (r0 - lo, r1 - r0, hi - lo)
            if len(tile) == 1 and key not in kept:
                gap = torch.arange(r0 + offset - hi + 1, r1 + offset - lo)
                full = bool(static_exist(pairs, gap + keys, torch.full_like(gap, keys)).all())
                kept[key] = (r1 - r0) * (hi - lo) if logits or not full else 0
    return sum(kept.values())


def _cost(m: Pairwise, r: Request) -> Cost:
    s = r.shape
    query_tile, key_tile = tile_sizes(m, r)
    fold = folding(m, r)
    step, pairs = (fold.count, fold.pairs) if fold else (1, m.pairs)
    keys = m.summary.rows(s.keys) if m.summary is not None else s.keys
    rows, keys = -(-s.length // step), -(-keys // step)
    area, largest, count = tile_area(pairs, rows, keys, query_tile, key_tile)
    stacks = s.batch * s.heads * step
    forward_flops = 2 * stacks * area * (s.head_dim + s.value_dim) + preparation_flops(m, r)
    back_flops = 2 * stacks * area * (3 * s.head_dim + 2 * s.value_dim)
    q, k, v, o = r.tensor_bytes()
    numbers = stacks * rows
    widened = 0 if r.item >= 4 or r.device != "cpu" else 2 * (q + k + v + o)
    moved = fold is not None and not fold.blocks
    copies = q + k + v if moved else 0
    scaled = q
    together = stacks
    if not (m.logits or r.masked or r.ragged):
        group = s.heads // s.kv_heads
        cached = CACHE_NUMBERS["cpu" if r.device == "cpu" else "cuda"] // max(1, group * largest)
        together = min(stacks, max(1, cached) * group)
    tile_bytes = together * largest * r.wide
    stat = numbers * r.wide
    sums = together * min(query_tile, rows) * s.value_dim * r.wide
    one_each = count <= -(-rows // query_tile)
    work = max(5 * tile_bytes // 2, tile_bytes + sums) if one_each else 5 * tile_bytes // 2 + 3 * sums
    biases = bias_numbers(pairs, bool(m.logits), rows, keys, query_tile, key_tile) * r.wide
    kept = scaled + copies + widened + o + biases * (s.heads if m.logits else 1)
    unfolded = o if moved else 0
    if not r.grad:
        peak = kept + max(work, unfolded) + (stat if r.lse else 0)
        return Cost(forward_flops, q + k + v + o + stacks * area * r.wide, peak, 6 * count)
    wide_grads = (k + v) * r.wide // r.item
    peak = kept + unfolded + 2 * stat + q + wide_grads + tile_bytes + work + weight_bytes(m, r)
    return Cost(
        forward_flops + back_flops, 3 * (q + k + v + o) + 3 * stacks * area * r.wide, peak, 20 * count
    )
