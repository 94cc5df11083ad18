"""Tables of kept blocks: for every block of queries the key blocks that it meets, whole ones first.

A table is built on its device from any mask by position or any choice of blocks; nothing of length x keys is held.
Partial blocks are cut by one key interval a row, or by bits. (Guo et al., Block Sparse Attention, 2024, keep such lists.)

Legend: N blocks of `rows` queries, M blocks of `size` keys; a leading batch or head axis of 1 is shared.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.kernels.extent import Grid, extent, interval
from saccade.parts.algebra import Full, Pairs, static_exist
from saccade.parts.selection import Blocks

EMPTY, PARTIAL, WHOLE = 0, 1, 2
MOST_BITS = 1 << 28


@dataclass(frozen=True)
class Lists:
    """index (b, h, N, T) int32, the first `count` (b, h, N) of each row hold, of them the first `full` are whole.

    tile (b, h, N, T) int32 says which bits cut a partial block; None where the interval of the row does.
    """

    index: Tensor
    count: Tensor
    full: Tensor
    tile: Tensor | None


@dataclass(frozen=True)
class BlockTable:
    """Kept blocks: state (b or 1, h or 1, N, M) is 0 empty, 1 partial, 2 whole; lists are made of it, either way round.

    A pair of a partial block exists where lo <= key < hi of its row, lo and hi (b or 1, L) in key indices, and, if
    there are bits, where bit (key mod 32) of bits[ids[b, h, n, m], row in block, key in block // 32] is set.
    """

    state: Tensor
    lo: Tensor
    hi: Tensor
    rows: int
    size: int
    keys: int
    ids: Tensor | None = None
    bits: Tensor | None = None

    @property
    def length(self) -> int:
        """Queries."""
        return self.lo.shape[1]

    @functools.cached_property
    def by_query(self) -> Lists:
        """Key blocks of every query block."""
        return lists(self.state, self.ids)

    @functools.cached_property
    def by_key(self) -> Lists:
        """Query blocks of every key block."""
        ids = None if self.ids is None else self.ids.transpose(-1, -2)
        return lists(self.state.transpose(-1, -2), ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself, without the lists."""
        return sum(x.nbytes for x in (self.state, self.lo, self.hi, self.ids, self.bits) if x is not None)

    def exist(self, batch: int = 0, head: int = 0) -> Tensor:
        """Every pair (L, S) of one sample and head, for tests and pictures."""

        def own(x: Tensor) -> Tensor:
            return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]

        i, j = torch.arange(self.length)[:, None], torch.arange(self.keys)[None]
        state = own(self.state).cpu()[i // self.rows, j // self.size]
        lo, hi = (x[min(batch, x.shape[0] - 1)].cpu()[:, None] for x in (self.lo, self.hi))
        cut = (j >= lo) & (j < hi)
        if self.ids is not None and self.bits is not None and self.bits.numel():
            tile = own(self.ids).cpu()[i // self.rows, j // self.size].clamp_min(0).long()
            word = self.bits.cpu()[tile, i % self.rows, j % self.size // 32]
            cut &= (word >> (j % self.size % 32)) & 1 != 0
        return (state == WHOLE) | ((state == PARTIAL) & cut)


def lists(state: Tensor, ids: Tensor | None) -> Lists:
    """The lists of a state (b, h, N, M): whole blocks in order, then partial ones in order."""
    state = state.contiguous()
    order = state.argsort(dim=-1, descending=True, stable=True)
    tile = None if ids is None else ids.expand_as(state).gather(-1, order)
    full = (state == WHOLE).sum(-1, dtype=torch.int32)
    return Lists(order.to(torch.int32), (state != EMPTY).sum(-1, dtype=torch.int32), full, tile)


@dataclass(frozen=True)
class Place:
    """Where the L queries and S keys of a call stand, as in a context: row r at r + offset, or at the end of `ends`."""

    length: int
    keys: int
    offset: int | None = 0
    start: int = 0
    ends: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def positions(self) -> Tensor:
        """Positions of the queries, (b or 1, L)."""
        if self.offset is not None:
            end = self.offset + self.length
            return torch.arange(self.offset, end, dtype=torch.int32, device=self.device)[None]
        assert self.ends is not None
        return torch.arange(self.length, device=self.device) + (self.ends[:, None] - self.length)

    def grid(self, rows: int, size: int) -> Grid:
        """Its blocks of pairs, counted on the CPU unless they differ between samples."""
        own = "cpu" if self.ends is None else self.device
        n = torch.arange(0, self.length, rows, device=own)[None, :, None]
        j0 = torch.arange(self.start, self.start + self.keys, size, device=own)[None, None]
        shift: Tensor | int
        if self.offset is None:
            assert self.ends is not None
            shift, least = (self.ends - self.length)[:, None, None], -self.length
        else:
            shift, least = self.offset, min(0, self.offset)
        i0, i1 = n + shift, (n + rows).clamp(max=self.length) + shift
        most = self.start + self.keys
        if self.offset is not None:
            most = max(most, self.offset + self.length)
        end = self.start + (self.keys if self.ends is None else self.ends[:, None, None])
        return Grid(i0, i1, j0, j0 + size, end, least, most + size, self.device)

    def state(self, pairs: Pairs, rows: int, size: int) -> Tensor:
        """Empty, partial or whole for each of its blocks, (b or 1, N, M)."""
        g = self.grid(rows, size)
        some, every = extent(pairs, g)
        found = (some | every).to(torch.int8) + every
        return found.expand(found.shape[0], g.i0.shape[1], g.j0.shape[2])

    def cuts(self, pairs: Pairs) -> tuple[Tensor, Tensor, bool]:
        """Key intervals of the rows, lo and hi (b or 1, L) int32, and whether they alone say which pairs exist."""
        i = self.positions
        found = interval(pairs, i, self.start + self.keys)
        lo, hi = (torch.zeros_like(i), torch.full_like(i, self.start + self.keys)) if found is None else found
        end: Tensor | int = self.keys if self.ends is None else self.ends[:, None]
        if self.start:
            lo, hi = lo - self.start, hi - self.start
        lo, hi = torch.broadcast_tensors(lo.clamp(min=0), torch.clamp(hi, max=end))
        return lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous(), found is not None


def table_of(pairs: Pairs, place: Place, rows: int = 128, size: int = 128) -> BlockTable:
    """The table of a mask by position."""
    state = place.state(pairs, rows, size)
    lo, hi, closed = place.cuts(pairs)
    table = BlockTable(state[:, None], lo, hi, rows, size, place.keys)
    if closed:
        return table
    ids, bits = _drawn([pairs], [state == PARTIAL], place, rows, size)
    return BlockTable(state[:, None], lo, hi, rows, size, place.keys, ids[0][:, None], bits)


def table_of_blocks(
    chosen: Blocks,
    place: Place,
    limit: Pairs | None = None,
    allow: Pairs | None = None,
    rows: int | None = None,
) -> BlockTable:
    """The table of limit & (chosen | allow); blocks of 1 row are drawn as bits, those of 64, 128, ... become lists.

    `rows` = 1 keeps single rows, as `decode` reads them.
    """
    limit = Full() if limit is None else limit
    rows, size = _sizes(chosen, rows)
    b, h = chosen.index.shape[:2]
    m = -(-place.keys // size)
    picked = kept_blocks(chosen, -(-place.keys // chosen.size))
    picked = _spread(picked, chosen.size // size, 3)[..., :m]
    single = chosen.rows < rows
    n = -(-place.length // rows)
    if single:
        each = torch.nn.functional.pad(picked, (0, 0, 0, -picked.shape[2] % rows))
        each = each.view(b, h, n, rows, m)
        picked = each.any(3)
    else:
        picked = _spread(picked, chosen.rows // rows, 2)[:, :, :n]
    under = place.state(limit, rows, size)[:, None]
    joint = None if allow is None else place.state(limit & allow, rows, size)[:, None]
    beside = torch.zeros_like(under) if joint is None else joint
    state = torch.where(picked, under, beside)
    if single:
        filled = each.sum(3) >= _heights(place.length, rows, n, picked.device)
        state = torch.where(picked & ~filled & (beside != WHOLE), state.clamp(max=PARTIAL), state)
    lo, hi, closed = place.cuts(limit)
    if closed and joint is None and not single:
        return BlockTable(state, lo, hi, rows, size, place.keys)
    part = state == PARTIAL
    if single:
        ids, bits = _drawn_rows(each, limit, allow, part, place, rows, size)
        return BlockTable(state, lo, hi, rows, size, place.keys, ids, bits)
    wanted, rules = [(part & picked).any(1)], [limit]
    if allow is not None:
        wanted.append((part & ~picked).any(1))
        rules.append(limit & allow)
    found, bits = _drawn(rules, wanted, place, rows, size)
    ids = found[0][:, None] if allow is None else torch.where(picked, found[0][:, None], found[1][:, None])
    return BlockTable(state, lo, hi, rows, size, place.keys, ids.expand_as(state), bits)


def kept_blocks(chosen: Blocks, blocks: int) -> Tensor:
    """Which of `blocks` key blocks each block of queries chose, (b, h, N, M)."""
    found = torch.zeros(*chosen.index.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.index.device)
    index = torch.where(chosen.valid, chosen.index.long(), blocks)
    return found.scatter_(-1, index, True)[..., :blocks]


def check_range(chosen: Blocks, keys: int) -> None:
    """Refuse a choice with a block that does not exist, saying where; it waits for the device."""
    blocks = -(-keys // chosen.size)
    wrong = chosen.valid & ((chosen.index < 0) | (chosen.index >= blocks))
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"block {int(chosen.index[where])} was chosen at {where}; {keys} keys have {blocks} blocks of {chosen.size}, 0 to "
            f"{blocks - 1}"
        )


def check_blocks(chosen: Blocks, keys: int) -> None:
    """Refuse a choice with blocks that do not exist or were chosen twice, saying where; a debugging aid."""
    check_range(chosen, keys)
    marked = torch.where(
        chosen.valid, chosen.index, -1 - torch.arange(chosen.index.shape[-1], device=chosen.index.device)
    )
    ordered = marked.sort(-1).values
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(again.any()):
        *where, slot = again.nonzero()[0].tolist()
        raise ValueError(
            f"block {int(ordered[(*where, slot)])} was chosen twice at {tuple(where)}; choose each block once"
        )


def _sizes(chosen: Blocks, rows: int | None) -> tuple[int, int]:
    """Rows and keys of a block of the table."""
    if rows == 1:
        if chosen.rows != 1:
            raise NotSupported(
                f"single rows were asked for, and blocks of {chosen.rows} queries share a choice"
            )
        return 1, chosen.size
    size = next((s for s in (128, 64) if chosen.size % s == 0), 0)
    high = rows or next((s for s in (128, 64) if chosen.rows == 1 or chosen.rows % s == 0), 0)
    if not size or not high or (chosen.rows > 1 and chosen.rows % high):
        raise NotSupported(
            f"blocks of {chosen.rows} queries and {chosen.size} keys fit no table; it takes 1 query or a multiple of 64, "
            f"and keys in multiples of 64; kernel `block` takes any"
        )
    return high, size


def _spread(x: Tensor, times: int, dim: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=dim)


def _heights(length: int, rows: int, blocks: int, device: torch.device) -> Tensor:
    """Queries of every block, (N, 1)."""
    return (length - torch.arange(blocks, device=device) * rows).clamp(max=rows)[:, None]


def _pack(exist: Tensor) -> Tensor:
    """Bits (..., size) as words (..., size / 32) int32, the first key lowest."""
    exist = torch.nn.functional.pad(exist, (0, -exist.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (exist.to(torch.int32) << torch.arange(32, dtype=torch.int32, device=exist.device)).sum(
        -1, dtype=torch.int32
    )


def _afford(tiles: int, rows: int, size: int) -> None:
    room = tiles * rows * -(-size // 32) * 4
    if room > MOST_BITS:
        raise NotSupported(
            f"{tiles:,} partial blocks would take {room:,} bytes of bits, the most is {MOST_BITS:,}; kernel `chunk` or `block` "
            "holds none"
        )


def _drawn(
    rules: list[Pairs], wanted: list[Tensor], place: Place, rows: int, size: int
) -> tuple[list[Tensor], Tensor]:
    """Bits of the wanted blocks (b or 1, N, M) of each rule, and their numbers (b or 1, N, M) int32.

    Blocks of a rule that sees only the gap i - j are the same along a diagonal, and drawn once for it.
    """
    ids, bits, count = [], [], 0
    for pairs, want in zip(rules, wanted, strict=True):
        if pairs.shift_invariant and place.offset is not None:
            number, tiles = _diagonals(pairs, place, rows, size, want)
        else:
            number, tiles = _each(pairs, place, rows, size, want)
        ids.append(number + count)
        bits.append(tiles)
        count += tiles.shape[0]
    return ids, torch.cat(bits)


def _diagonals(pairs: Pairs, place: Place, rows: int, size: int, want: Tensor) -> tuple[Tensor, Tensor]:
    n, m = want.shape[-2:]
    device = want.device
    grain = math.gcd(rows, size)
    count = (n - 1) * (rows // grain) + (m - 1) * (size // grain) + 1
    _afford(count, rows, size)
    assert place.offset is not None
    lowest = place.offset - place.start - (m - 1) * size
    base = max(0, -lowest) + place.keys + size
    gaps = lowest + grain * torch.arange(count, device=device)
    i = (base + gaps)[:, None, None] + torch.arange(rows, device=device)[:, None]
    j = (torch.full_like(gaps, base))[:, None, None] + torch.arange(size, device=device)
    tiles = _pack(static_exist(pairs, i, j))
    row = torch.arange(n, device=device)[:, None] * (rows // grain)
    column = (m - 1 - torch.arange(m, device=device))[None] * (size // grain)
    return (row + column).to(torch.int32)[None], tiles


def _each(pairs: Pairs, place: Place, rows: int, size: int, want: Tensor) -> tuple[Tensor, Tensor]:
    where = want.nonzero()
    _afford(where.shape[0], rows, size)
    ids = torch.zeros(want.shape, dtype=torch.int32, device=want.device)
    ids[tuple(where.unbind(1))] = torch.arange(where.shape[0], dtype=torch.int32, device=want.device)
    i, j = _within(place, rows, size, where[:, 0], where[:, 1], where[:, 2])
    step = max(1, (1 << 26) // (rows * size))
    words = [
        _pack(static_exist(pairs, i[a : a + step], j[a : a + step])) for a in range(0, where.shape[0], step)
    ]
    empty = torch.zeros(0, rows, -(-size // 32), dtype=torch.int32, device=want.device)
    return ids, torch.cat(words) if words else empty


def _within(place: Place, rows: int, size: int, b: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the rows (P, rows, 1) and keys (P, 1, size) of blocks."""
    first: Tensor | int = 0 if place.offset is None else place.offset
    if place.offset is None:
        assert place.ends is not None
        first = (place.ends - place.length)[b][:, None]
    i = (n[:, None] * rows + torch.arange(rows, device=n.device) + first)[..., None]
    j = (m[:, None] * size + torch.arange(size, device=n.device) + place.start)[:, None]
    return i, j


def _drawn_rows(
    each: Tensor, limit: Pairs, allow: Pairs | None, part: Tensor, place: Place, rows: int, size: int
) -> tuple[Tensor, Tensor]:
    """Bits of partial blocks whose rows chose for themselves: `each` (b, h, N, rows, M)."""
    where = part.nonzero()
    _afford(where.shape[0], rows, size)
    ids = torch.zeros(part.shape, dtype=torch.int32, device=part.device)
    b, h, n, m = where.unbind(1)
    ids[b, h, n, m] = torch.arange(where.shape[0], dtype=torch.int32, device=part.device)
    step, words = max(1, (1 << 26) // (rows * size)), []
    for a in range(0, where.shape[0], step):
        at = slice(a, a + step)
        i, j = _within(place, rows, size, b[at], n[at], m[at])
        exist = each[b[at], h[at], n[at], :, m[at]].unsqueeze(-1).expand(-1, -1, size)
        if allow is not None:
            exist = exist | static_exist(allow, i, j)
        words.append(_pack(exist & static_exist(limit, i, j)))
    empty = torch.zeros(0, rows, -(-size // 32), dtype=torch.int32, device=part.device)
    return ids, torch.cat(words) if words else empty
