"""The keys of each row as a few intervals, for every expression of masks that has so short a form."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.algebra import And, Interval, Mask, Or, Pairs

MOST = 16


def intervals(pairs: Pairs, i: Tensor, keys: int) -> list[Interval] | None:
    """Disjoint key intervals [lo, hi) of rows i (n,), ascending in each row, within the keys; None where there are many."""
    found = _intervals(pairs, i, keys)
    if found is None or len(found) > MOST:
        return None
    found = [_clip(lo, hi, keys) for lo, hi in found]
    return found if len(found) == 1 else _merged(found)


def _clip(lo: Tensor, hi: Tensor, keys: int) -> Interval:
    hi = hi.clamp(0, keys)
    return torch.minimum(lo.clamp(min=0), hi), hi


def _intervals(pairs: Pairs, i: Tensor, keys: int) -> list[Interval] | None:
    if isinstance(pairs, Mask):
        return pairs.intervals(i, keys)
    if not isinstance(pairs, And | Or):
        return None
    terms = [_intervals(p, i, keys) for p in pairs.parts]
    if isinstance(pairs, Or):
        return None if None in terms else [x for t in terms for x in t or ()]
    whole: list[Interval] = [(torch.zeros_like(i), torch.full_like(i, keys))]
    for term in terms:
        if term is None:
            return None
        term = term if len(term) == 1 else _merged([_clip(lo, hi, keys) for lo, hi in term])
        whole = [(torch.maximum(a, c), torch.minimum(b, d)) for a, b in whole for c, d in term]
    return [(torch.minimum(lo, hi), hi) for lo, hi in whole]


def _merged(found: list[Interval]) -> list[Interval]:
    """The union of some intervals a row as disjoint ones, ascending; rows with fewer than others end with empty ones."""
    if not found:
        return []
    lo, hi = (torch.stack(x) for x in zip(*found, strict=True))
    top = int(hi.max()) if hi.numel() else 0
    empty = lo >= hi
    lo, hi = lo.masked_fill(empty, top), hi.masked_fill(empty, top)
    lo, order = lo.sort(dim=0, stable=True)
    hi = hi.gather(0, order)
    first, last = torch.full_like(lo, top), torch.full_like(hi, top)
    rows = torch.arange(lo.shape[1], device=lo.device)
    slot = torch.full_like(rows, -1)
    end = torch.full_like(rows, -1)
    for a, b in zip(lo, hi, strict=True):
        new = (a > end) & (a < b)
        slot = slot + new
        start = first[slot.clamp(min=0), rows]
        first[slot.clamp(min=0), rows] = torch.where(new, a, start)
        end = torch.where(a < b, torch.maximum(end, b), end)
        last[slot.clamp(min=0), rows] = torch.where(slot < 0, top, end)
    used = int(slot.max()) + 1 if slot.numel() else 0
    return list(zip(first[:used], last[:used], strict=True))
