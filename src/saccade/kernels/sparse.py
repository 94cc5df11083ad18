"""Block-sparse attention on a GPU: any mask by position and any choice of key blocks, forward and backward, in Triton."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.errors import NotSupported
from saccade.kernels import routed, sparse_run
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.block import chosen_rows
from saccade.kernels.chunk import softmax_only, tile_area
from saccade.kernels.decode import ROWS
from saccade.kernels.extent import interval
from saccade.kernels.routed import MOST_BLOCKS, Rule
from saccade.kernels.table import MOST_BITS, BlockTable, Place, check_range, table_of, table_of_blocks
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full, Pairs
from saccade.parts.budget import Top
from saccade.parts.mask import Causal, Chunk, Neighborhood
from saccade.parts.pair import Context, Program, without_padding
from saccade.parts.proxy import MeanKey
from saccade.parts.score import Dot
from saccade.parts.select import Choice, TopBlocks, choice_of
from saccade.parts.selection import Blocks

BLOCK = 128
SHORT = 4096
SLAB = 1 << 24
LEAST, TILE = 2, 64  # keys of a chosen block; rows and keys of the blocks of a shared choice


class SparseKernel(Kernel):
    """Tables of kept blocks: masks by position, and blocks of keys that queries choose."""

    name = "sparse"
    counted = False

    def efficiency(self, r: Request) -> float:
        if r.device == "cpu":
            return 1e-5
        if r.dtype.itemsize > 2:
            return 0.4
        return 0.95 if max(r.shape.head_dim, r.shape.value_dim) <= 128 else 0.6

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if r.device not in ("cpu", "cuda"):
            why.append("runs on CUDA")
        elif sparse_run.missing(r.device):
            why.append(sparse_run.missing(r.device))
        if r.dtype == torch.float64 and not (r.device == "cpu" and sparse_run.interpreted()):
            why.append("adds up in float32")
        s = r.shape
        if max(s.head_dim, s.value_dim) > 256:
            why.append(f"head sizes are at most 256, here {max(s.head_dim, s.value_dim)}")
        if r.masked:
            why.append("a mask of single pairs is not followed into blocks")
        if not isinstance(m, Pairwise):
            return why
        if m.summary is not None or m.tiles is not None:
            why.append("knows neither summaries nor demanded tiles")
        if m.logits:
            why.append(f"the logits part {m.logits[0].name} is not followed into blocks")
        return why + (_static(m.pairs, r) if m.static else _chosen_blocks(m.pairs, r))

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        stacks = s.batch * s.heads
        q, k, v, o = r.tensor_bytes()
        stat = stacks * s.length * r.wide
        blocks = -(-s.length // BLOCK) * -(-s.keys // BLOCK)
        if m.static:
            area, moved, table = tile_area(m.pairs, s.length, s.keys, BLOCK, SLAB)[0], 0, 11 * blocks
        else:
            limit, allow, select = choice_of(m.pairs)  # type: ignore[misc]
            count = -(-s.keys // select.size)
            rows = chosen_rows(select, limit, s.length, s.keys)[0]
            area = rows * select.size
            area += tile_area(limit & allow, s.length, s.keys, BLOCK, SLAB)[0] if allow is not None else 0
            moved = stacks * rows * (s.head_dim + s.value_dim) * r.item
            table = 11 * blocks + stacks * s.length * select.keep.most(count) * (
                8 + r.wide + s.value_dim * r.item
            )
        per_pair = 2 * (s.head_dim + s.value_dim) + (2 * (3 * s.head_dim + 2 * s.value_dim) if r.grad else 0)
        peak = o + stat + table + (q + k + v + stat + weight_bytes(m, r) if r.grad else 0)
        return Cost(
            stacks * area * per_pair + preparation_flops(m, r),
            (3 if r.grad else 1) * (q + k + v + o + moved),
            peak,
            (2 if m.static else 16) * (3 if r.grad else 1),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        place = Place(c.q.shape[2], c.k.shape[2], c.offset, c.start, c.ends, c.q.device)
        if m.static:
            q, k, v, scale = _prepared(m, c)
            out, lse = sparse_run.attend(q, k, v, _table(m.pairs, place), scale)
            return out, lse
        limit, allow, select = choice_of(m.pairs)  # type: ignore[misc]
        c = replace(without_padding(c), looks_back=m.causal)
        chosen = _choose(select, c)
        q, k, v, scale = _prepared(m, replace(c, selection=chosen))
        if chosen.rows > 1:
            return sparse_run.attend(q, k, v, table_of_blocks(chosen, place, limit, allow), scale)
        if q.shape[2] <= ROWS and not r.grad:
            return routed.decode(q, k, v, table_of_blocks(chosen, place, limit, allow, rows=1), scale)
        blocks = -(-place.keys // chosen.size)
        index = torch.where(chosen.valid, chosen.index, -1).to(torch.int32).contiguous()
        way = routed.route(index, blocks, chosen.size)
        beside = None if allow is None else _table(limit & allow, place)
        return routed.attend(q, k, v, way, _rule(limit, allow, chosen.size, place), beside, scale)


def _static(pairs: Pairs, r: Request) -> list[str]:
    s = r.shape
    if s.length <= ROWS and r.shifted:
        return [f"for more than {ROWS} query rows after a cache; decode reads those"]
    if _closed(pairs) or (pairs.shift_invariant and not r.ragged):
        return []
    area = tile_area(pairs, s.length, s.keys, BLOCK, SLAB)[0] * (s.batch if r.ragged else 1)
    return (
        [f"bits of partial blocks may take {area // 8:,} bytes, at most {MOST_BITS:,}"]
        if area // 8 > MOST_BITS
        else []
    )


def _chosen_blocks(pairs: Pairs, r: Request) -> list[str]:
    form = choice_of(pairs)
    if form is None:
        return ["pairs are not one choice of blocks united with masks by position"]
    limit, allow, select = form
    blocks = -(-r.shape.keys // select.size)
    why = []
    if select.size < LEAST:
        why.append(f"for blocks of at least {LEAST} keys, here {select.size}")
    if select.height > 1 and (select.height % TILE or select.size % TILE):
        why.append(
            f"blocks that share a choice are multiples of {TILE}, here {select.height} queries and {select.size} keys"
        )
    if blocks > MOST_BLOCKS:
        why.append(f"at most {MOST_BLOCKS:,} blocks to choose from, here {blocks:,}; take larger blocks")
    if not _closed(limit) or (allow is not None and not _closed(allow)):
        why.append(f"chosen blocks under {pairs} are not cut by one key interval a row")
    return why


def _closed(pairs: Pairs) -> bool:
    return interval(pairs, torch.zeros(1, dtype=torch.long), 1) is not None


def _prepared(m: Pairwise, c: Context) -> tuple[Tensor, Tensor, Tensor, float]:
    """Prepared q, k and v, and the scale of their product; a plain dot leaves q as it is."""
    if isinstance(m.score, Dot):
        if c.ends is not None:
            c = without_padding(c)
        return c.q, c.k, c.v, m.score.scale or c.q.shape[-1] ** -0.5
    program = Program.bind(m, c)
    return program.q, program.k, program.v, 1.0


def _table(pairs: Pairs, place: Place) -> BlockTable:
    """The table of a mask; those that all samples share are kept for the next call."""
    if place.ends is not None:
        return table_of(pairs, place, *[_side(pairs)] * 2)
    assert place.offset is not None
    return _kept(pairs, place.length, place.keys, place.offset, place.start, str(place.device))


@functools.lru_cache(maxsize=32)
def _kept(pairs: Pairs, length: int, keys: int, offset: int, start: int, device: str) -> BlockTable:
    return table_of(pairs, Place(length, keys, offset, start, None, device), *[_side(pairs)] * 2)


def _side(pairs: Pairs) -> int:
    """Rows and keys of a block: half as many where a mask reaches so little that the blocks at its border count."""
    reach = pairs.horizon if not isinstance(pairs, Neighborhood) else pairs.width
    return BLOCK if reach is None or reach > SHORT else BLOCK // 2


def _choose(select: Choice, c: Context) -> Blocks:
    """The choice that is replayed, or a new one; each block at most once a query."""
    if c.selection is not None:
        if not isinstance(c.selection, Blocks):
            raise NotSupported(f"a choice of blocks was to be replayed, got {type(c.selection).__name__}")
        check_range(c.selection, c.k.shape[2])
        return _distinct(c.selection)
    blocks = -(-c.k.shape[2] // select.size)
    plain = isinstance(select, TopBlocks) and isinstance(select.keep, Top) and type(select.proxy) is MeanKey
    if not plain or select.height > 1 or blocks > MOST_BLOCKS:
        return select.choose(c)
    assert isinstance(select, TopBlocks)
    with torch.no_grad():
        own = torch.div(c.i, select.size, rounding_mode="floor") if c.looks_back else None
        means = select.proxy.keys(c, select.size)
        index = routed.choose(c.q, means, select.keep.most(blocks), select.size, own, c.key_ends)
    return Blocks(index, index >= 0, select.size)


def _distinct(chosen: Blocks) -> Blocks:
    if chosen.rows > 1:
        return chosen
    index = torch.where(chosen.valid, chosen.index, -1).sort(-1).values
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = index[..., 1:] == index[..., :-1]
    return Blocks(index, (index >= 0) & ~again, chosen.size)


def _rule(limit: Pairs, allow: Pairs | None, size: int, place: Place) -> Rule:
    """What cuts chosen blocks: the limit, and what the mask by position has already; kept as tables are."""
    if place.ends is not None:
        return _made_rule(limit, allow, size, place)
    assert place.offset is not None
    return _kept_rule(
        limit, allow, size, place.length, place.keys, place.offset, place.start, str(place.device)
    )


@functools.lru_cache(maxsize=32)
def _kept_rule(
    limit: Pairs, allow: Pairs | None, size: int, length: int, keys: int, offset: int, start: int, device: str
) -> Rule:
    return _made_rule(limit, allow, size, Place(length, keys, offset, start, None, device))


def _made_rule(limit: Pairs, allow: Pairs | None, size: int, place: Place) -> Rule:
    past = limit == Causal() and allow in (None, Chunk(size))
    free = limit == Full() and allow is None and place.keys % size == 0
    lo, hi, _ = place.cuts(limit)
    skip, to, _ = (
        place.cuts(allow) if allow is not None else (torch.zeros_like(lo), torch.zeros_like(hi), True)
    )
    return Rule(lo, hi, skip.contiguous(), to.contiguous(), place.ends is None and (past or free))
