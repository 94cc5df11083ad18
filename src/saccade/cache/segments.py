"""Keys and values of many rows, each with a number of its own, end to end in one tensor.

Legend: b batch, g key-value heads, R = b g rows, n keys of a row, T keys of all rows, r query heads a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from saccade.parts.normalizer import merge
from saccade.plan import attend

Partial = tuple[Tensor, Tensor]
"""An output (b, h, L, e) and its log-denominator (b, h, L)."""


@dataclass(frozen=True)
class Segments:
    """Row after row: keys (T, d), values (T, e), the position of each key in its text (T,), and the keys of each row.

    Row i is head i % g of sample i // g. No byte is spent on rows that keep less than others.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: tuple[int, ...]

    @classmethod
    def kept(cls, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor) -> Segments:
        """The keys of k (b, g, n, d), v (b, g, n, e), positions (b, g, n) where `keep` (b, g, n) is True, in order."""
        counts = tuple(keep.flatten(0, 1).sum(-1).tolist())
        return cls(k[keep], v[keep], positions[keep], counts)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.positions))

    @property
    def starts(self) -> list[int]:
        """Where each row begins."""
        return [0, *accumulate(self.counts)][:-1]

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k (R, n, d), v (R, n, e), positions (R, n) and which are keys (R, n), for the longest row's n."""
        longest = max(self.counts, default=0)
        places = torch.arange(longest, device=self.keys.device)
        there = places < torch.tensor(self.counts, device=places.device)[:, None]
        index = torch.tensor(self.starts, device=places.device)[:, None] + torch.where(there, places, 0)
        index = index.clamp(max=max(0, len(self.keys) - 1))
        if not len(self.keys):
            index = index[:, :0]
        return self.keys[index], self.values[index], self.positions[index], there

    def select(self, rows: Sequence[int]) -> Segments:
        """These rows, in this order."""
        starts = self.starts
        index = torch.cat(
            [torch.arange(starts[n], starts[n] + self.counts[n], device=self.keys.device) for n in rows]
            or [torch.zeros(0, dtype=torch.long, device=self.keys.device)]
        )
        return Segments(
            self.keys[index], self.values[index], self.positions[index], tuple(self.counts[n] for n in rows)
        )

    def read(self, q: Tensor) -> Partial | None:
        """What queries (b, h, L, d), all of them later than every key, find here; None where there are no keys."""
        if not len(self.keys):
            return None
        b, h, length, d = q.shape
        rows = len(self.counts)
        asked = q.reshape(rows, b * h // rows, length, d)
        groups: dict[int, list[int]] = {}
        for n, count in enumerate(self.counts):
            groups.setdefault(count, []).append(n)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*asked.shape[:3], self.values.shape[-1])
        lse = q.new_full(asked.shape[:3], -torch.inf, dtype=wide)
        starts = self.starts
        for count, members in groups.items():
            if not count:
                continue
            whole = len(members) == rows
            if whole:
                k, v = (x.view(rows, 1, count, -1) for x in (self.keys, self.values))
            else:
                k, v = (
                    torch.stack([x[starts[n] : starts[n] + count] for n in members]).unsqueeze(1)
                    for x in (self.keys, self.values)
                )
            made = attend(asked if whole else asked[members], k, v, "full", need=("out", "lse"))
            assert made.lse is not None
            if whole:
                out, lse = made.out, made.lse
            else:
                out[members], lse[members] = made.out, made.lse
        return out.view(b, h, length, -1), lse.view(b, h, length)


def joined(partials: Sequence[Partial | None]) -> Tensor:
    """The output (b, h, L, e) of partial results over parts of the keys."""
    found = [p for p in partials if p is not None]
    return found[0][0] if len(found) == 1 else merge(found)[0]
