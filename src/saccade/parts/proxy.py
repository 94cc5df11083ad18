"""Cheap scores of queries for blocks of keys, by which blocks are chosen.

Legend: b batch, h query heads, g key-value heads, N blocks of `rows` queries, U blocks of `size` keys, p proxy size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.parts.base import Part
from saccade.parts.score import grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context


def block_mean(x: Tensor, size: int, valid: Tensor | None) -> Tensor:
    """Means (b, n, U, d) of blocks of `size` tokens of x (b, n, S, d), in float32 or wider; padding does not count."""
    short = -x.shape[2] % size
    wide = torch.promote_types(x.dtype, torch.float32)
    if size == 1 and valid is None:
        return x.to(wide)
    if valid is None:
        sums = (pad(x, (0, 0, 0, short)) if short else x).unflatten(2, (-1, size)).sum(3, dtype=wide)
        count = torch.full((sums.shape[2], 1), size, device=x.device, dtype=wide)
        if short:
            count[-1] = size - short
        return sums / count
    kept = valid[:, None, :, None]
    sums = pad(x.masked_fill(~kept, 0), (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3, dtype=wide)
    count = pad(kept, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3).to(wide)
    return sums / count.clamp_min(1)


def block_ends(x: Tensor, size: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Greatest and least of every channel (b, n, U, d) in blocks of `size` tokens of x (b, n, S, d), in float32 or wider.

    Padding does not count; a block of padding alone gives zeros.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    ends = []
    for fill, pick in ((-torch.inf, torch.amax), (torch.inf, torch.amin)):
        kept = x if valid is None else x.masked_fill(~valid[:, None, :, None], fill)
        blocks = pad(kept, (0, 0, 0, -x.shape[2] % size), value=fill).unflatten(2, (-1, size))
        found = pick(blocks, dim=3)
        ends.append(found.masked_fill(torch.isinf(found), 0))
    return ends[0], ends[1]


def last_positions(c: Context, rows: int) -> Tensor:
    """The position of the last query of each block of `rows`, (b or 1, N)."""
    length = c.q.shape[2]
    ends = torch.arange(1, -(-length // rows) + 1, device=c.q.device).mul(rows).clamp(max=length)
    return c.i[:, ends - 1]


class Proxy(Part):
    """A cheap score of blocks of queries for blocks of keys: most are a product of one vector a block.

    `prepare` runs once a call; `scores` then answers (b, h, Q, U) logits for some blocks of queries against the first
    `reach` blocks of keys.
    """

    kind = "proxy"

    def flops(self, head_dim: int) -> int:
        """Matrix FLOPs of one score."""
        return 2 * head_dim

    def score_flops(self, head_dim: int, size: int, rows: int) -> int:
        """Matrix FLOPs of the score of a block of `rows` queries for one of `size` keys."""
        return self.flops(head_dim)

    def lessons(self, c: Context, size: int, rows: int, open_: Tensor) -> dict[str, Tensor]:
        """Losses that teach the proxy, by name; `c` holds q, k and v before the token maps.

        `open_` (b or 1, 1, N, U) says which blocks of keys are candidates.
        """
        return {}

    def queries(self, c: Context, rows: int) -> Tensor:
        """One vector a block of `rows` queries, (b, h, N, p)."""
        return block_mean(c.q, rows, c.query_valid if rows > 1 else None)

    def keys(self, c: Context, size: int) -> Tensor:
        """One vector a block of `size` keys, (b, g, U, p)."""
        raise NotImplementedError

    def prepare(self, c: Context, size: int, rows: int) -> Any:
        """What `scores` needs of a whole call."""
        return self.queries(c, rows), self.keys(c, size)

    def scores(self, ready: Any, cut: slice, reach: int) -> Tensor:
        """Logits (b, h, Q, reach) of the blocks of queries in `cut`."""
        q, k = ready
        q = q[:, :, cut]
        return grouped_matmul(q * q.shape[-1] ** -0.5, k[:, :, :reach].transpose(-1, -2))


@dataclass(frozen=True)
class MeanKey(Proxy):
    """The mean query of a block times the mean of a block's keys; padding does not count."""

    name = "mean_key"

    def keys(self, c: Context, size: int) -> Tensor:
        return block_mean(c.k, size, c.valid)


@dataclass(frozen=True)
class BoundKey(Proxy):
    """An upper bound of what any key of the block can score: every channel at the end that suits the query.

    (Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024.)
    """

    name = "bound_key"

    def flops(self, head_dim: int) -> int:
        return 4 * head_dim

    def queries(self, c: Context, rows: int) -> Tensor:
        q = block_mean(c.q, rows, c.query_valid)
        return (
            torch.cat((q.clamp_min(0), q.clamp_max(0)), -1) * 2**0.5
        )  # undoes the larger head_dim of the scale

    def keys(self, c: Context, size: int) -> Tensor:
        return torch.cat(block_ends(c.k, size, c.valid), -1)
