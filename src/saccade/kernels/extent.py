"""Which blocks of pairs an expression surely leaves empty or surely fills, for all blocks at once on any device.

Legend: rows [i0, i1) against keys [j0, j1), tensors that broadcast to one number a block of pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.parts.algebra import And, Mask, Or, Pairs, static_exist
from saccade.parts.mask import Global

Two = tuple[Tensor, Tensor]
PAIRS = 1 << 26


@dataclass(frozen=True)
class Grid:
    """Blocks of pairs: i0 and i1 (b or 1, N, 1), j0 and j1 (1, 1, M), whole also where keys end at `end`.

    They lie on the CPU where they are the same for all samples, and answers come on `device`. All positions are in [low, high).
    """

    i0: Tensor
    i1: Tensor
    j0: Tensor
    j1: Tensor
    end: Tensor | int
    low: int
    high: int
    device: torch.device | str

    def there(self) -> Grid:
        """The same on its device."""
        i0, i1, j0, j1 = _sent(self.device, self.i0, self.i1, self.j0, self.j1)
        return replace(self, i0=i0, i1=i1, j0=j0, j1=j1)


def _sent(device: torch.device | str, *tensors: Tensor) -> list[Tensor]:
    """Small tensors in one copy."""
    if torch.device(device) == tensors[0].device:
        return list(tensors)
    flat = torch.cat([x.reshape(-1) for x in tensors]).to(device)
    pieces = flat.split([x.numel() for x in tensors])
    return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def extent(pairs: Pairs, g: Grid) -> Two:
    """(some, every): False in `some` means surely no pair of the block, True in `every` surely all of them."""
    first, last = interval(pairs, g.i0, g.high), interval(pairs, g.i1 - 1, g.high)
    if (
        first is not None and last is not None
    ):  # neither end of an interval ever falls from one row to the next
        ends = [torch.clamp(x, max=g.end) for x in (first[1], last[1])]
        lo0, lo1, hi0, hi1, j0, j1 = _sent(g.device, first[0], last[0], *ends, g.j0, g.j1)
        return (j0 < hi1) & (j1 > lo0), (j0 >= lo1) & (j1 <= hi0)
    if pairs.shift_invariant and isinstance(pairs, Mask | And | Or):
        return _ended(_by_gap(pairs, g.there()), g)
    if isinstance(pairs, And | Or):
        each = [extent(p, g) for p in pairs.parts]
        join = torch.logical_and if isinstance(pairs, And) else torch.logical_or
        return functools.reduce(join, (s for s, _ in each)), functools.reduce(join, (e for _, e in each))
    assert isinstance(pairs, Mask)
    if isinstance(pairs, Global):
        i0, i1, j0, j1 = _sent(g.device, g.i0, g.i1, g.j0, g.j1)
        n = pairs.tokens
        return _ended(((j0 < n) | (i0 < n), (j1 <= n) | (i1 <= n)), g)
    if pairs.uniform(0, max(1, g.high)):
        keys = torch.arange(g.low, g.high, device=g.device)
        j0, j1 = _sent(g.device, g.j0, g.j1)
        return _ended(_counted(static_exist(pairs, torch.zeros_like(keys), keys), j0 - g.low, j1 - g.low), g)
    return _ended(_evaluated(pairs, g.there()), g)


def _ended(found: Two, g: Grid) -> Two:
    """Blocks that reach beyond the keys are not whole, and those beyond them are empty."""
    j0, j1 = _sent(g.device, g.j0, g.j1)
    return found[0] & (j0 < g.end), found[1] & (j1 <= g.end)


def _counted(exist: Tensor, lo: Tensor, hi: Tensor) -> Two:
    """Whether any and all of exist[lo:hi) hold, by running sums."""
    sums = torch.nn.functional.pad(exist.cumsum(0, dtype=torch.int32), (1, 0))
    most = exist.numel()
    found = sums[hi.clamp(0, most)] - sums[lo.clamp(0, most)]
    return found > 0, found == hi - lo


def _by_gap(pairs: Pairs, g: Grid) -> Two:
    """Where only the gap i - j matters: a block holds every gap between its corners, so this is exact."""
    most = g.high - g.low
    gaps = torch.arange(1 - most, most, device=g.i0.device)
    exist = static_exist(pairs, gaps + most, torch.full_like(gaps, most))
    return _counted(exist, g.i0 - g.j1 + most, g.i1 - g.j0 + most - 1)


def _evaluated(pairs: Mask, g: Grid) -> Two:
    """Any mask, by looking at every pair, some rows of blocks at a time."""
    device = g.i0.device
    batch, count, blocks = g.i0.shape[0], g.i0.shape[1], g.j0.shape[2]
    rows = int((g.i1 - g.i0).max()) if count else 1
    size = int((g.j1 - g.j0).max()) if blocks else 1
    j = (g.j0[..., None] + torch.arange(size, device=device)).view(1, 1, 1, -1)
    step = max(1, PAIRS // max(1, batch * rows * blocks * size))
    some, every = [], []
    for n in range(0, count, step):
        i = (g.i0[:, n : n + step] + torch.arange(rows, device=device))[..., None]
        outside = i >= g.i1[:, n : n + step, :, None]
        found = pairs.exist(i, j).expand(batch, -1, rows, -1)
        shape = (batch, -1, rows, blocks, size)
        some.append((found & ~outside).view(shape).any(4).any(2))
        every.append((found | outside).view(shape).all(4).all(2))
    return torch.cat(some, 1), torch.cat(every, 1)


def interval(pairs: Pairs, i: Tensor, high: int) -> Two | None:
    """Keys [lo, hi) that the rows at positions i read, where they form one interval in closed form; else None.

    Neither end falls as i rises.
    """
    if isinstance(pairs, And):
        each = [interval(p, i, high) for p in pairs.parts]
        if any(e is None for e in each):
            return None
        lo = functools.reduce(torch.maximum, (e[0] for e in each if e is not None))
        hi = functools.reduce(torch.minimum, (e[1] for e in each if e is not None))
        return lo, hi
    if not isinstance(pairs, Mask) or isinstance(
        pairs, Global
    ):  # the first rows of a global mask reach farthest
        return None
    found = pairs.intervals(i, high)
    return found[0] if found is not None and len(found) == 1 else None
