"""Softmax over coded keys in linear time: near keys one by one, older ones by a count and a mean value a code.

Keys of one code have one logit, so n of them with mean value u weigh as one key with logit s + log n and value u. A query
reads its own block of keys and the one before, and the codes of all earlier blocks.
Legend: b batch, h query heads, g key-value heads, n tokens, d key size, e value size, S codes, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.base import Sizes
from saccade.parts.codes import CodedDot
from saccade.parts.logits import Logits, Softcap, Temperature
from saccade.parts.mask import Causal
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Tile, without_padding
from saccade.parts.relative import RelTable, T5Bias
from saccade.parts.score import grouped_matmul

NUMBERS = 1 << 22  # logits held at once


def settled(part: Logits, block: int) -> bool:
    """True where the part treats all keys alike that stand more than a block before the query."""
    if isinstance(part, RelTable):
        return part.clip <= block
    return isinstance(part, Softcap | Temperature) or (isinstance(part, T5Bias) and part.distance <= block)


def obstacles(m: Mechanism) -> list[str]:
    """Why counts cannot stand for the old keys of a mechanism; empty where they can."""
    if not isinstance(m, Pairwise):
        return [f"runs pairwise mechanisms, this one is {m.family}"]
    if not isinstance(m.score, CodedDot):
        return [f"the score {m.score.name} does not code keys"]
    why = []
    if m.pairs != Causal():
        why.append("rows read other keys than those up to themselves")
    if type(m.normalizer) is not Softmax or m.reweight or m.value or m.summary is not None:
        why.append("weights are changed, so that keys of one code may weigh otherwise")
    why += [
        f"{p} tells keys apart that are more than {m.score.block} tokens old"
        for p in m.logits
        if not settled(p, m.score.block)
    ]
    if m.heads is not None and m.heads.learned_query:
        why.append("a learned query has its own prefix scan")
    if m.tiles is not None:
        why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
    return why


@dataclass(frozen=True)
class Past:
    """What older keys left a code: how many there were, (N, g, S), and the sum of their values, (N, g, S, e)."""

    count: Tensor
    total: Tensor


def tally(index: Tensor, v: Tensor, codes: int, valid: Tensor | None = None) -> Past:
    """The past that keys with codes index (N, g, n) and values v (N, g, n, e) leave; those not `valid` (N, n) leave none."""
    one = torch.ones_like(index, dtype=v.dtype)
    if valid is not None:
        one = one * valid[:, None]
    count = torch.zeros(*index.shape[:2], codes, dtype=v.dtype, device=v.device)
    total = torch.zeros(*index.shape[:2], codes, v.shape[-1], dtype=v.dtype, device=v.device)
    return Past(
        count.scatter_add(2, index, one),
        total.scatter_add(2, index.unsqueeze(-1).expand_as(v), v * one.unsqueeze(-1)),
    )


def read(
    m: Pairwise,
    c: Context,
    q: Tensor,
    past: Past,
    near: tuple[Tensor, Tensor],
    i: Tensor,
    j: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out (N, h, r, e), lse)` of rows q (N, h, r, d) of one block each, at positions i (r,).

    `near` holds the keys, as codes, and the values of the tokens at j (m,), which begin with a block; those not `valid`
    (N, m) are padding.
    """
    assert isinstance(m.score, CodedDot)
    keys, v = near
    codes = m.score.codebook(c)
    rows, cols = i[:, None], j[None]
    exist = cols <= rows
    if valid is not None:
        exist = exist & valid[:, None, None]
    far = _terms(m, c, q, codes.expand(q.shape[0], -1, -1, -1), i, i[:1] - m.score.block - 1)
    mean = past.total / past.count.clamp_min(1).unsqueeze(-1)
    far = far + past.count.log().repeat_interleave(q.shape[1] // codes.shape[0], 1)[:, :, None]
    own = _terms(m, c, q, keys, i, j).masked_fill(~exist, -torch.inf)
    w, lse = Softmax().normalize(torch.cat((far, own), -1))
    return grouped_matmul(w[..., : codes.shape[1]], mean) + grouped_matmul(w[..., codes.shape[1] :], v), lse


def _terms(m: Pairwise, c: Context, q: Tensor, keys: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The logits of rows at i against keys at j, or of old keys that all stand at one j."""
    s = grouped_matmul(q, keys.mT)
    nothing = slice(0, 0)
    t = Tile(q, keys, keys, i[None, None, :, None], j[None, None, None], nothing, j, {}, c.params)
    for part in m.logits:
        s = part.tile(s, t)
    return s


class CodesKernel(Kernel):
    """Blocks of queries against two blocks of keys and the codes of all keys before."""

    name = "codes"

    def efficiency(self, r: Request) -> float:
        return 0.2

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = obstacles(m)
        if r.masked:
            why.append("a mask of single pairs tells keys of one code apart")
        if r.shifted:
            why.append("every token brings its query")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        assert isinstance(m.score, CodedDot)
        s, block = r.shape, m.score.block
        rows = s.batch * s.heads * -(-s.length // block) * block
        width = m.score.codes + 2 * block
        sizes = Sizes(s.heads, s.kv_heads, s.head_dim, s.value_dim)
        terms = sum(p.row_flops(sizes, s.keys) for p in m.logits)
        flops = 2 * rows * (width * (s.head_dim + s.value_dim) + terms) * (3 if r.grad else 1)
        flops += preparation_flops(m, r) - s.batch * s.heads * s.length * terms * (3 if r.grad else 1)
        q, k, v, o = r.tensor_bytes()
        past = -(-s.keys // block) * s.batch * s.kv_heads * m.score.codes * (s.value_dim + 1) * r.wide
        logits = rows * width * r.wide
        held = (2 * q + 3 * k + 5 * v + 2 * o) * r.wide // r.item + 3 * past
        slab = min(logits, max(NUMBERS, s.batch * s.heads * block * width) * r.wide)
        passes = 3 if r.grad else 1
        peak = held + (3 * logits if r.grad else 5 * slab // 2)
        return Cost(flops, passes * (held + 3 * logits), peak, 60 * passes)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        assert isinstance(m.score, CodedDot)
        c, valid = without_padding(c), c.valid
        index, keys = m.score.coded(c)
        b, h, n = c.q.shape[:3]
        block, codes = m.score.block, m.score.codes
        blocks = -(-n // block)
        q, v = m.score.scaled(c.q.to(keys.dtype)), c.v.to(keys.dtype)
        if valid is None and blocks * block > n:
            valid = torch.ones(1, n, dtype=torch.bool, device=q.device).expand(b, -1)

        def split(x: Tensor) -> Tensor:
            """Tokens (b, ?, n, d) as blocks (b, N, ?, B, d)."""
            whole = pad(x, (0, 0, 0, blocks * block - n))
            return whole.unflatten(2, (blocks, block)).transpose(1, 2)

        def paired(x: Tensor) -> Tensor:
            """Each block (b, N, ?, B, d) after the one before it, zeros before the first: (b, N, ?, 2 B, d)."""
            return torch.cat((pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x), 3)

        rows, key_blocks, value_blocks = split(q), split(keys), split(v)
        index_blocks = split(index.unsqueeze(-1))
        kept = None if valid is None else split(valid[:, None, :, None])
        left = tally(
            index_blocks.flatten(0, 1).squeeze(-1),
            value_blocks.flatten(0, 1),
            codes,
            None if kept is None else kept.flatten(0, 1)[:, 0, :, 0],
        )
        past = [
            pad(x.unflatten(0, (b, blocks)).cumsum(1), (0, 0) * (x.dim() - 1) + (2, 0))[:, :blocks]
            for x in (left.count, left.total)
        ]
        real = torch.ones_like(key_blocks[:, :, :1, :, :1], dtype=torch.bool) if kept is None else kept
        near = [paired(key_blocks), paired(value_blocks), paired(real)]
        i, j = torch.arange(block, 2 * block, device=q.device), torch.arange(2 * block, device=q.device)
        step = max(1, NUMBERS // (b * h * block * (codes + 2 * block)))
        found = []
        for first in range(0, blocks, step):
            cut = slice(first, first + step)
            own = [x[:, cut].flatten(0, 1) for x in (rows, *past, *near)]
            out, lse = read(m, c, own[0], Past(own[1], own[2]), (own[3], own[4]), i, j, own[5][:, 0, :, 0])
            found.append([x.unflatten(0, (b, -1)) for x in (out, lse)])
        out, lse = (torch.cat(x, 1).transpose(1, 2).flatten(2, 3)[:, :, :n] for x in zip(*found, strict=True))
        return out.to(r.dtype), lse
