"""Which keys the native engine meets for which rows: intervals of keys, or tiles of rows with the keys that they share.

Intervals are what most masks are, in the order of the tokens or of residue classes; the engine cuts them into tiles itself.
Tiles are listed for grids, shuffled orders and all other masks: every row of a tile meets the union of what its rows read.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saccade.kernels.tiles import Group, groups, tiling, totals
from saccade.native.call import Part
from saccade.parts.algebra import And, Full, Interval, Or, Pairs, cover, static_exist
from saccade.parts.grid import GridNeighborhood
from saccade.parts.interval import intervals
from saccade.parts.mask import Causal, Dilated, Neighborhood, Strided

LANES = 64
SIDES, PER_KEY, PER_TILE = (1, 2, 4, 8, 16, 32, 64), 8, 2048
CACHE_BYTES = 1 << 26


def lanes(rows: int) -> int:
    """Lanes that so many rows of a tile take."""
    return -(-rows // 16) * 16


@dataclass(frozen=True)
class Intervals:
    """Rows of some slots, each with the same number of intervals of key slots: lo and hi (1 or b, n, slots), int32."""

    lo: Tensor
    hi: Tensor
    row_order: Tensor | None = None
    key_order: Tensor | None = None

    @classmethod
    def of(
        cls, found: list[Interval], row_order: Tensor | None = None, key_order: Tensor | None = None
    ) -> Intervals:
        """Of intervals of rows (n,) each."""
        lo, hi = (torch.stack(x).to(torch.int32).unsqueeze(0) for x in zip(*found, strict=True))
        return cls(lo, hi, row_order, key_order)

    def struct(self) -> Part:
        """As the engine reads it; the tensors must outlive it."""
        return Part(
            row_order=_address(self.row_order),
            key_order=_address(self.key_order),
            slots=self.lo.shape[2],
            lo=self.lo.data_ptr(),
            hi=self.hi.data_ptr(),
            intervals=self.lo.shape[1],
            per_batch=int(self.lo.shape[0] > 1),
        )

    def area(self, fold: int = 1) -> int:
        """Pairs that the tiles of a head compute, of `fold` heads that share tiles, summed over what differs in a batch."""
        lo, hi = (x.repeat(1, 1, fold).numpy().astype(np.int64) for x in (self.lo, self.hi))
        short = -lo.shape[2] % LANES
        gone = np.int64(1) << 40
        dead = lo >= hi
        lo, hi = np.where(dead, gone, lo), np.where(dead, 0, hi)
        lo = np.pad(lo, ((0, 0), (0, 0), (0, short)), constant_values=gone).reshape(*lo.shape[:2], -1, LANES)
        hi = np.pad(hi, ((0, 0), (0, 0), (0, short)), constant_values=0).reshape(*hi.shape[:2], -1, LANES)
        wide = np.full(lo.shape[2], LANES)
        if short and len(wide):
            wide[-1] = lanes(LANES - short)
        return int((np.maximum(hi.max(-1) - lo.min(-1), 0) * wide).sum())

    @property
    def nbytes(self) -> int:
        return (
            self.lo.nbytes
            + self.hi.nbytes
            + sum(x.nbytes for x in (self.row_order, self.key_order) if x is not None)
        )


@dataclass(frozen=True)
class Listed:
    """Tiles (n, 6): first row slot, rows, first key slot, keys that all rows read, other keys, the first of their masks."""

    tile: Tensor
    row_order: Tensor
    key_order: Tensor
    bits: Tensor

    def struct(self) -> Part:
        """As the engine reads it; the tensors must outlive it."""
        return Part(
            row_order=_address(self.row_order),
            key_order=_address(self.key_order),
            slots=len(self.row_order),
            tile=self.tile.data_ptr(),
            tiles=len(self.tile),
            bits=_address(self.bits),
        )

    def area(self, fold: int = 1) -> int:
        """Pairs that the tiles of a head compute."""
        rows, keys = (self.tile[:, 1] + 15) // 16 * 16, self.tile[:, 3] + self.tile[:, 4]
        return int((rows * keys).sum())

    @property
    def nbytes(self) -> int:
        return self.tile.nbytes + self.row_order.nbytes + self.key_order.nbytes + self.bits.nbytes


Table = tuple[Intervals | Listed, ...]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


_CACHE: OrderedDict[tuple[Pairs, int, int, int, int], Table | None] = OrderedDict()


def table(pairs: Pairs, rows: int, keys: int, offset: int, start: int = 0) -> Table | None:
    """The parts of a mask for rows at offset, offset + 1, ... and keys from `start` on; None where there is no good form.

    Kept for the next call; the kept ones take at most CACHE_BYTES.
    """
    key = (pairs, rows, keys, offset, start)
    if key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    made = _CACHE[key] = _make(pairs, rows, keys, offset, start)
    while len(_CACHE) > 1 and sum(p.nbytes for t in _CACHE.values() for p in t or ()) > CACHE_BYTES:
        _CACHE.popitem(last=False)
    return made


def ragged_table(pairs: Pairs, i: Tensor, keys: int, start: int, ends: Tensor) -> Table | None:
    """The same where the keys of a sample end at `ends` (b,); rows stand at i (1 or b, n)."""
    found = intervals(pairs, i.flatten(), start + keys)
    if found is None:
        return None
    limit = ends[:, None]
    each = [[(x - start).clamp(min=0).view(i.shape).minimum(limit) for x in pair] for pair in found]
    lo, hi = (torch.stack(x, 1).to(torch.int32).contiguous() for x in zip(*each, strict=True))
    return (Intervals(lo, hi),)


def _make(pairs: Pairs, rows: int, keys: int, offset: int, start: int) -> Table | None:
    i = torch.arange(offset, offset + rows)
    found = intervals(pairs, i, start + keys)
    if found is not None:
        moved = [((lo - start).clamp(min=0), (hi - start).clamp(min=0)) for lo, hi in found]
        return (Intervals.of(moved),) if moved else ()
    if start:
        return None
    whole = rows == keys and not offset
    if whole and isinstance(pairs, GridNeighborhood):
        return (_of_groups(groups(pairs, _sides(pairs), "cpu")),)
    shuffled = tiling(pairs, keys, "cpu") if whole else None
    if shuffled is not None:
        return (_of_groups(shuffled),)
    classes = _classes(pairs, i, keys)
    if classes is not None:
        return (classes,)
    terms = _terms(pairs)
    plain = [t for t in terms if intervals(t, i, keys) is not None]
    others = [t for t in terms if t not in plain]
    orders = [_classes(t, i, keys) for t in others]
    if None in orders:
        return (_by_position(pairs, i, keys),)
    parts: list[Intervals | Listed] = []
    held: Pairs | None = None
    if plain:
        held = _any(plain)
        joined = intervals(held, i, keys)
        if joined is None:
            return (_by_position(pairs, i, keys),)
        parts.append(Intervals.of(joined))
    for term, order in zip(others, orders, strict=True):
        assert order is not None
        parts.append(_listed(_left(order, term, held, offset)))
        held = term if held is None else _any([held, term])
    return tuple(parts)


def _any(terms: list[Pairs]) -> Pairs:
    return terms[0] if len(terms) == 1 else Or(tuple(terms))


def _terms(pairs: Pairs) -> list[Pairs]:
    """Expressions whose union the pairs are: the members of one union, each under the limits beside it."""
    atoms = pairs.parts if isinstance(pairs, And) else (pairs,)
    unions = [p for p in atoms if isinstance(p, Or)]
    if len(unions) != 1:
        return [pairs]
    limit: Pairs = Full()
    for p in atoms:
        limit = limit if p is unions[0] else limit & p
    return [limit & p for p in unions[0].parts]


def _classes(pairs: Pairs, i: Tensor, keys: int) -> Intervals | None:
    """Dilations and strides as intervals in the order of residue classes."""
    atoms = [p for p in (pairs.parts if isinstance(pairs, And) else (pairs,)) if not isinstance(p, Causal)]
    past = isinstance(pairs, And) and len(atoms) < len(pairs.parts)
    if len(atoms) != 1:
        return None
    (atom,) = atoms
    if not isinstance(atom, Dilated | Strided | Neighborhood):
        return None
    step = atom.dilation if isinstance(atom, Neighborhood) else atom.step
    j = torch.arange(keys)
    key_order = (j % step).argsort(stable=True)
    size = (keys - torch.arange(step) + step - 1) // step
    first = size.clamp(min=0).cumsum(0) - size
    order = (i % step).argsort(stable=True)
    i = i[order]
    base, own = first[i % step], torch.div(i, step, rounding_mode="floor")
    if isinstance(atom, Neighborhood):
        side = atom.width // 2
        lo, hi = own - side, own + (1 if past else side + 1)
    else:
        lo, hi = own - atom.width + 1 if isinstance(atom, Dilated) else torch.zeros_like(own), own + 1
    hi = torch.minimum(hi.clamp(min=0), size[i % step])
    lo = torch.minimum(lo.clamp(min=0), hi)
    return Intervals.of([(base + lo, base + hi)], order.to(torch.int32), key_order.to(torch.int32))


def _left(
    part: Intervals, term: Pairs, held: Pairs | None, offset: int
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """The tiles of a part without what is held already: rows, keys and who reads whom."""
    assert part.row_order is not None
    assert part.key_order is not None
    lo, hi = part.lo[0, 0], part.hi[0, 0]
    for a in range(0, len(lo), LANES):
        rows = part.row_order[a : a + LANES].long()
        first, last = int(lo[a : a + LANES].min()), int(hi[a : a + LANES].max())
        cols = part.key_order[first:last].long()
        i, j = rows[:, None] + offset, cols[None]
        exist = static_exist(term, i, j)
        yield rows, cols, exist if held is None else exist & ~static_exist(held, i, j)


def _by_position(pairs: Pairs, i: Tensor, keys: int) -> Listed:
    """Any mask, in tiles of rows that stand side by side."""

    def tiles() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for a in range(0, len(i), LANES):
            own = i[a : a + LANES]
            spans = cover(pairs, int(own[0]), int(own[-1]) + 1, keys)
            cols = torch.cat([torch.arange(lo, hi) for lo, hi in spans] or [torch.arange(0)])
            exist = static_exist(pairs, own[:, None], cols[None])
            yield torch.arange(a, a + len(own)), cols, exist.expand(len(own), len(cols))

    return _listed(tiles())


def _of_groups(found: tuple[Group, ...]) -> Listed:
    return _listed(
        (cells, cols, _near(g.near, n))
        for g in found
        for n, (cells, cols) in enumerate(zip(g.cells, g.keys, strict=True))
    )


def _sides(mask: GridNeighborhood) -> tuple[int, ...]:
    """Cells of a tile along each axis: whole groups of a stride, as few lanes times keys as can be."""
    choices = []
    for axis in mask.axes:
        most = -(-axis.size // axis.dilation)
        choices.append(sorted({min(most, -(-n // axis.stride) * axis.stride) for n in SIDES}))

    def work(sides: tuple[int, ...]) -> float:
        pairs, keys, tiles = (math.prod(x) for x in zip(*map(totals, mask.axes, sides), strict=True))
        rows = math.prod(sides)
        return (
            pairs * (rows // LANES * LANES + lanes(rows % LANES)) / rows + PER_KEY * keys + PER_TILE * tiles
        )

    return min((s for s in itertools.product(*choices) if math.prod(s) <= 16 * LANES), key=work)


def _near(near: Tensor | None, n: int) -> Tensor | None:
    return near if near is None or near.dim() == 2 else near[n]


def _listed(tiles: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Listed:
    """Tiles of rows (Q,) and keys (K,), and who reads whom (Q, K), None where all do; more than 64 rows are cut up."""
    tile, rows, keys, bits = [], [], [], []
    at_row = at_key = at_bits = 0
    seen: dict[int, list[tuple[slice, Tensor, Tensor, int]]] = {}
    kept = []  # keeps what `seen` names by its identity alive
    for own, cols, near in tiles:
        found = None if near is None else seen.get(id(near))
        if found is None:
            found = []
            for a in range(0, len(own), LANES):
                cut = slice(a, min(len(own), a + LANES))
                whole, other, masks = _masks(near, cut, len(cols))
                found.append((cut, torch.cat((whole, other)), whole, at_bits))
                bits.append(masks)
                at_bits += len(masks)
            if near is not None:
                seen[id(near)] = found
                kept.append(near)
        for cut, order, whole, first in found:
            tile.append((at_row, cut.stop - cut.start, at_key, len(whole), len(order) - len(whole), first))
            rows.append(own[cut])
            keys.append(cols[order])
            at_row, at_key = at_row + cut.stop - cut.start, at_key + len(order)
    return Listed(
        torch.tensor(tile, dtype=torch.long).reshape(-1, 6),
        _joined(rows, torch.int32),
        _joined(keys, torch.int32),
        _joined(bits, torch.long),
    )


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)


def _masks(near: Tensor | None, cut: slice, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that all rows of a cut read, those that some do, and the masks of the latter: bit r is the r-th row."""
    if near is None:
        return torch.arange(keys), torch.arange(0), torch.empty(0, dtype=torch.long)
    exist = near[cut]
    every = exist.all(0)
    some = exist.any(0) & ~every
    cols = exist[:, some].T.numpy()
    spread = np.zeros((cols.shape[0], LANES), dtype=bool)
    spread[:, : cols.shape[1]] = cols
    packed = np.packbits(spread, axis=1, bitorder="little").view(np.int64).reshape(-1)
    return every.nonzero().flatten(), some.nonzero().flatten(), torch.from_numpy(packed)
