"""How grids and shuffled orders fall into tiles: cells that run together, and the keys that they can reach.

Tiles whose masks look alike (all those in the middle, those along one border, ...) form a group, which runs as one batch
with one mask. T tiles of a group, Q cells and K keys of one tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.parts.algebra import And, Pairs
from saccade.parts.grid import Axis, GridNeighborhood
from saccade.parts.mask import Causal
from saccade.parts.pattern import Permuted

NUMBERS = {"cpu": 1 << 17, "cuda": 1 << 26}
SIDES = (1, 2, 4, 8, 16, 32, 64, 128)
PER_KEY, PER_TILE, SHUFFLED = 24, 512, 64


@dataclass(frozen=True)
class Strip:
    """Tiles of one axis that look alike: coordinates of their cells (T, Q) and keys (T, K), and who reads whom (Q, K)."""

    cells: Tensor
    keys: Tensor
    near: Tensor


@dataclass(frozen=True)
class Group:
    """Tiles of one size: cell numbers (T, Q) and (T, K), and who reads whom, (Q, K) or (T, Q, K); None where all do."""

    cells: Tensor
    keys: Tensor
    near: Tensor | None


@functools.lru_cache(maxsize=512)
def strips(axis: Axis, side: int) -> tuple[Strip, ...]:
    """The tiles of an axis, `side` cells of one class of dilation each, with the keys that they reach."""
    alike: dict[tuple[int, int, bytes], tuple[list[Tensor], list[Tensor], Tensor]] = {}
    for group in range(min(axis.dilation, axis.size)):
        count = int(axis.members(group))
        first, end = axis.bounds(torch.arange(count), count)
        for a in range(0, count, side):
            rows = slice(a, min(count, a + side))
            lo, hi = int(first[rows].min()), int(end[rows].max())
            keys = torch.arange(lo, hi)
            near = (keys >= first[rows, None]) & (keys < end[rows, None])
            cells = torch.arange(rows.start, rows.stop)
            found = alike.setdefault((len(cells), len(keys), near.numpy().tobytes()), ([], [], near))
            found[0].append(cells * axis.dilation + group)
            found[1].append(keys * axis.dilation + group)
    return tuple(Strip(torch.stack(c), torch.stack(k), near) for c, k, near in alike.values())


@functools.lru_cache(maxsize=32)
def groups(mask: GridNeighborhood, sides: tuple[int, ...], device: str) -> tuple[Group, ...]:
    """All tiles of a grid, group by group."""
    found = []
    for parts in itertools.product(*(strips(a, s) for a, s in zip(mask.axes, sides, strict=True))):
        cells, keys, near = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), None
        for axis, strip in zip(mask.axes, parts, strict=True):
            cells, keys = (
                (old[:, None, :, None] * axis.size + new[None, :, None]).flatten(0, 1).flatten(1)
                for old, new in ((cells, strip.cells), (keys, strip.keys))
            )
            both = strip.near if near is None else near[:, None, :, None] & strip.near[None, :, None]
            near = both if near is None else both.flatten(0, 1).flatten(1)
        assert near is not None
        found.append(Group(cells.to(device), keys.to(device), None if bool(near.all()) else near.to(device)))
    return tuple(found)


@functools.lru_cache(maxsize=32)
def shuffled_groups(mask: Permuted, causal: bool, tokens: int, device: str) -> tuple[Group, ...]:
    """Tiles of a shuffled order, `SHUFFLED` tokens each, by how many keys they reach."""
    place, at = mask.place(torch.arange(tokens)).sort()
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for a in range(0, tokens, SHUFFLED):
        rows = slice(a, min(tokens, a + SHUFFLED))
        ends = place[[a, rows.stop - 1]] + torch.tensor([-(mask.width // 2), mask.width // 2 + 1])
        lo, hi = torch.searchsorted(place, ends).tolist()
        alike.setdefault((rows.stop - a, hi - lo), []).append((at[rows], at[lo:hi]))
    found = []
    for tiles in alike.values():
        cells, keys = (torch.stack(x) for x in zip(*tiles, strict=True))
        near = mask.exist(cells.unsqueeze(2), keys.unsqueeze(1))
        near = near & (keys.unsqueeze(1) <= cells.unsqueeze(2)) if causal else near
        found.append(Group(cells.to(device), keys.to(device), near.to(device)))
    return tuple(found)


def tiling(pairs: Pairs, tokens: int, device: str) -> tuple[Group, ...] | None:
    """The tiles of an expression over whole self-attention, or None where it is none of those that fall into tiles."""
    if isinstance(pairs, GridNeighborhood):
        return groups(pairs, tile_sides(pairs), device)
    atoms = pairs.parts if isinstance(pairs, And) else (pairs,)
    shuffled = [p for p in atoms if isinstance(p, Permuted)]
    if len(shuffled) == 1 and all(p == Causal() for p in atoms if p is not shuffled[0]):
        return shuffled_groups(shuffled[0], len(atoms) > 1, tokens, device)
    return None


@functools.lru_cache(maxsize=1024)
def totals(axis: Axis, side: int) -> tuple[int, int, int]:
    """Pairs, keys and tiles of one axis, summed over its tiles."""
    found = [(s.cells.shape[0], s.cells.shape[1], s.keys.shape[1]) for s in strips(axis, side)]
    return sum(t * q * k for t, q, k in found), sum(t * k for t, _, k in found), sum(t for t, _, _ in found)


@functools.lru_cache(maxsize=256)
def tile_sides(mask: GridNeighborhood) -> tuple[int, ...]:
    """Cells of a tile along each axis: whole groups of a stride, as little wasted work as can be."""
    choices = []
    for axis in mask.axes:
        most = -(-axis.size // axis.dilation)
        choices.append(sorted({min(most, -(-n // axis.stride) * axis.stride) for n in SIDES}))

    def work(sides: tuple[int, ...]) -> int:
        pairs, keys, tiles = (math.prod(x) for x in zip(*map(totals, mask.axes, sides), strict=True))
        return pairs + PER_KEY * keys + PER_TILE * tiles

    return min(itertools.product(*choices), key=work)


def batches(group: Group, each: int, device: str) -> Iterator[Group]:
    """The tiles of a group, as many at once as leave their logits in cache; `each` is what one pair takes."""
    size = each * group.cells.shape[1] * group.keys.shape[1]
    step = max(1, NUMBERS["cpu" if device == "cpu" else "cuda"] // max(1, size))
    for a in range(0, group.cells.shape[0], step):
        cut = slice(a, a + step)
        near = group.near[cut] if group.near is not None and group.near.dim() == 3 else group.near
        yield Group(group.cells[cut], group.keys[cut], near)
