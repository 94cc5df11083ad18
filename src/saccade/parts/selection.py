"""What was chosen, as values: kept, replayed and frozen in tests.

Legend: b batch, h query heads, L queries, S keys, T choices a query, C buckets, w bucket width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Chosen key blocks of `size` tokens: index and valid are (b, h, N, T) for N blocks of `rows` queries.

    One row and one token are blocks as well. A block chosen twice counts once.
    """

    index: Tensor
    valid: Tensor
    size: int
    rows: int = 1

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        """Boolean (b, h, Q, K) for the rows and the key indices `cols`."""
        start, stop, _ = rows.indices(self.index.shape[2] * self.rows)
        first, last = start // self.rows, -(-stop // self.rows)
        index, valid = self.index[:, :, first:last], self.valid[:, :, first:last]
        blocks = int(cols.max()) // self.size + 1 if cols.numel() else 1
        count = max(blocks, int(index.max()) + 1 if index.numel() else 1)
        table = torch.zeros((*index.shape[:3], count), dtype=torch.uint8, device=j.device)
        table.scatter_reduce_(-1, index, valid.to(torch.uint8), "amax")
        kept = table.index_select(-1, cols // self.size).bool()
        owner = torch.arange(start, stop, device=j.device) // self.rows - first
        return kept if self.rows == 1 else kept.index_select(2, owner)


@dataclass(frozen=True)
class Spans:
    """One key interval [lo, hi] for every query: both (b, h, L)."""

    lo: Tensor
    hi: Tensor

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        return (j >= self.lo[:, :, rows, None]) & (j <= self.hi[:, :, rows, None])


@dataclass(frozen=True)
class Labels:
    """Pairs exist where the labels of query (b, h, L) and key (b, h, S) agree."""

    q: Tensor
    k: Tensor

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        return self.q[:, :, rows, None] == self.k[:, :, None].index_select(-1, cols)


@dataclass(frozen=True)
class Buckets:
    """Token indices of every bucket, q (b, h, C, wq) and k (b, h, C, wk), and which of them count."""

    q: Tensor
    k: Tensor
    q_valid: Tensor
    k_valid: Tensor


@dataclass(frozen=True)
class Lives:
    """Keys and their last readers: key n is read from position n + start to `last` (b, h, S) by queries at i (b or 1, L)."""

    last: Tensor
    i: Tensor
    start: int = 0

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        i = self.i[:, None, rows, None]
        return (cols + self.start <= i) & (i <= self.last.index_select(-1, cols).unsqueeze(-2))


Selection = Blocks | Spans | Labels | Buckets | Lives
