"""A softmax map pooled over blocks of queries and keys, tile by tile: the map itself is never held.

Legend: b batch, h query heads, g key-value heads, N blocks of `rows` queries, U blocks of `size` keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.parts.proxy import Proxy
from saccade.parts.score import grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context

TILE = {"cpu": (128, 512), "cuda": (1024, 4096)}


@dataclass(frozen=True)
class BlockMap:
    """The largest weight in each block, and the sum of its weights, both (b, h, N, U) in float32 or wider."""

    largest: Tensor
    mass: Tensor


def block_map(c: Context, size: int, rows: int = 1) -> BlockMap:
    """softmax(q.k / sqrt(head_dim)) of all pairs, under a causal limit where `c` looks back, pooled over blocks.

    Each tile of logits leaves a maximum and a log-sum a row and block; the log-denominator of the row comes with the last tile
    (Gao et al., SeerAttention, 2024). Padding has no weight.
    """
    wide = torch.promote_types(c.q.dtype, torch.float32)
    q, k = c.q.to(wide) * c.q.shape[-1] ** -0.5, c.k.to(wide)
    if c.valid is not None:
        k = k.masked_fill(~c.valid[:, None, :, None], 0)
    high, across = TILE["cpu" if q.device.type == "cpu" else "cuda"]
    high, across = -(-high // rows) * rows, -(-across // size) * size
    found = [_slab(c, q, k, size, rows, r, high, across) for r in range(0, q.shape[2], high)]
    return BlockMap(torch.cat([x for x, _ in found], 2), torch.cat([x for _, x in found], 2))


def _slab(
    c: Context, q: Tensor, k: Tensor, size: int, rows: int, r0: int, high: int, across: int
) -> tuple[Tensor, Tensor]:
    """Maxima and sums of the weights of `high` queries from r0 on."""
    cut, keys = slice(r0, r0 + high), k.shape[2]
    i = c.i[:, cut]
    shape = (*q.shape[:2], i.shape[1], -(-keys // size))
    tops, logs = q.new_full(shape, -torch.inf), q.new_full(shape, -torch.inf)
    end = min(keys, c.offset + int(r0 + i.shape[1])) if c.looks_back and c.offset is not None else keys
    for k0 in range(0, end, across):
        s = grouped_matmul(q[:, :, cut], k[:, :, k0 : k0 + across].transpose(-1, -2))
        j = torch.arange(k0, k0 + s.shape[-1], device=q.device)
        exist = j < c.key_ends[:, None, None]
        if c.looks_back:
            exist = exist & (j <= i[..., None])
        s = s.masked_fill(~exist[:, None], -torch.inf)
        s = pad(s, (0, -s.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size))
        units = slice(k0 // size, k0 // size + s.shape[-2])
        tops[..., units] = s.amax(-1)
        logs[..., units] = torch.logsumexp(s, -1)
    total = torch.logsumexp(logs, -1, keepdim=True)
    total = total.masked_fill(torch.isneginf(total), 0.0)
    valid = c.query_valid
    pooled = []
    for x in (tops, logs):
        x = torch.exp(x - total)
        if valid is not None:
            x = x.masked_fill(~valid[:, None, cut, None], 0)
        pooled.append(pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows)))
    return pooled[0].amax(3), pooled[1].sum(3)


@dataclass(frozen=True)
class BlockMass(Proxy):
    """The log of the attention that a key of the block gets, on average, from all queries of theirs: O(L S) once, to be reused."""

    name = "block_mass"

    def score_flops(self, head_dim: int, size: int, rows: int) -> int:
        return 2 * head_dim * size * rows

    def prepare(self, c: Context, size: int, rows: int) -> Tensor:
        mass = block_map(c, size, rows).mass
        first = torch.arange(mass.shape[-1], device=mass.device) * size
        count = (c.key_ends[:, None] - first).clamp(1, size)
        return (mass / count[:, None, None]).clamp_min(torch.finfo(mass.dtype).tiny).log()

    def scores(self, ready: Tensor, cut: slice, reach: int) -> Tensor:
        return ready[:, :, cut, :reach]
