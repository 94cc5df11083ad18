"""What was chosen, as values: kept, replayed and frozen in tests.

Legend: b batch, h query heads, L queries, S keys, T choices a query, C buckets, w bucket width, V levels.
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
class Floors:
    """Keys of at least a row's floor: score (b, h, S), floor (b, h, L); none after the row's `last` (b or 1, L), if given."""

    score: Tensor
    floor: Tensor
    last: Tensor | None = None

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        """Boolean (b, h, Q, K) for the rows and the key indices `cols`."""
        found = self.score[:, :, None].index_select(-1, cols) >= self.floor[:, :, rows, None]
        return found if self.last is None else found & (j <= self.last[:, None, rows, None])


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
class Sampled:
    """Pairs that share a bucket, and sampled keys that stand for the rest of a query's node, by V levels of nodes.

    Nodes q_node (b or 1, V, L) and k_node (b or 1, V, S) are numbers, -1 and -2 where a token is in none on a level; buckets
    q (b, h, V, L) and k (b, h, V, S) are numbers of their own node; sampled (b or 1, h, V, S) marks keys, and `log_weight`
    (b, h, V, L) is what a query adds to the logits of those outside of its bucket.
    """

    q_node: Tensor
    k_node: Tensor
    q: Tensor
    k: Tensor
    sampled: Tensor
    log_weight: Tensor

    def _level(self, v: int, rows: slice, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of one node, those of one bucket, and sampled keys, broadcastable to (b, h, Q, K)."""
        node = self.q_node[:, None, v, rows, None] == self.k_node[:, None, v, None].index_select(-1, cols)
        near = self.q[:, :, v, rows, None] == self.k[:, :, v, None].index_select(-1, cols)
        return node, near, self.sampled[:, :, v, None].index_select(-1, cols)

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        shape = (*self.q.shape[:2], self.q[0, 0, 0, rows].shape[0], cols.shape[0])
        found = torch.zeros(shape, dtype=torch.bool, device=j.device)
        for v in range(self.q.shape[2]):
            node, near, sampled = self._level(v, rows, cols)
            found |= node & (near | sampled)
        return found

    def weigh(self, rows: slice, cols: Tensor) -> Tensor:
        """What pairs add to their logits, (b, h, Q, K)."""
        total = torch.zeros((), dtype=self.log_weight.dtype, device=cols.device)
        for v in range(self.q.shape[2]):
            node, near, sampled = self._level(v, rows, cols)
            total = total + self.log_weight[:, :, v, rows, None] * (node & sampled & ~near)
        return total


@dataclass(frozen=True)
class Lives:
    """Keys and their last readers: key n is read from position n + start to `last` (b, h, S) by queries at i (b or 1, L)."""

    last: Tensor
    i: Tensor
    start: int = 0

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        i = self.i[:, None, rows, None]
        return (cols + self.start <= i) & (i <= self.last.index_select(-1, cols).unsqueeze(-2))


Selection = Blocks | Spans | Labels | Buckets | Sampled | Floors | Lives
