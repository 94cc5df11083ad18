"""Weights, key mass and selections beside any kernel: recomputed from q and k, a slab of rows at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import ByHead, Join, Mechanism, Mix, Mixer, Pairwise, Recurrent
from saccade.parts.pair import Context, Program, map_tokens, without_padding
from saccade.parts.select import Select
from saccade.parts.selection import Buckets, Selection
from saccade.reference import by_head, evaluate, recurrent_weights

BUDGET = 1 << 26
SLAB = 128


def weights(m: Mechanism, c: Context, heads: tuple[int, ...] | None, rows: tuple[int, ...] | None) -> Tensor:
    """Weights (B, heads, rows, S). Raises NotSupported above 2^26 numbers unless heads or rows are named."""
    total, length = c.q.shape[1], _rows(m, c)
    heads = tuple(range(total)) if heads is None else tuple(_index("head", h, total) for h in heads)
    rows = tuple(range(length)) if rows is None else tuple(_index("row", r, length) for r in rows)
    size = c.q.shape[0] * len(heads) * len(rows) * c.k.shape[2]
    if size > BUDGET:
        raise NotSupported(
            f"{size:,} weights were asked for, more than {BUDGET:,}; name fewer with saccade.Weights(heads=(0,), rows=(5, 6))"
        )
    if not rows:
        return c.q.new_zeros(c.q.shape[0], len(heads), 0, c.k.shape[2])
    found = []
    for at in range(0, len(rows), SLAB):
        part = rows[at : at + SLAB]
        lo, hi = min(part), max(part) + 1
        near = hi - lo <= 2 * SLAB
        found += (
            [slab(m, c, lo, hi)[:, list(heads)][:, :, [r - lo for r in part]]]
            if near
            else [slab(m, c, r, r + 1)[:, list(heads)] for r in part]
        )
    return torch.cat(found, dim=2)


def mass(m: Mechanism, c: Context) -> Tensor:
    """The weight that every key receives, summed over queries, (B, H, S)."""
    length = _rows(m, c)
    total = torch.zeros(
        c.q.shape[0],
        c.q.shape[1],
        c.k.shape[2],
        dtype=torch.promote_types(c.q.dtype, torch.float32),
        device=c.q.device,
    )
    for r0 in range(0, length, SLAB):
        w = slab(m, c, r0, min(length, r0 + SLAB))
        if c.query_valid is not None:
            w = w.masked_fill(~c.query_valid[:, None, r0 : r0 + SLAB, None], 0)
        total += w.sum(2)
    return total


def slab(m: Mechanism, c: Context, r0: int, r1: int) -> Tensor:
    """Weights of rows [r0, r1), (B, H, r1 - r0, S)."""
    if not c.q.shape[0] or not c.k.shape[2]:
        return c.q.new_zeros(*c.q.shape[:2], r1 - r0, c.k.shape[2])
    if isinstance(m, ByHead):
        return torch.cat(
            [slab(child, share, r0, r1) for child, share in zip(m.children, by_head(m, c), strict=True)],
            dim=1,
        )
    if isinstance(m, Mix):
        return torch.stack(
            [share * slab(child, c, r0, r1) for child, share in zip(m.children, m.share(), strict=True)]
        ).sum(0)
    if isinstance(m, Join):
        lses = [evaluate(child, c)[1] for child in m.children]
        total = torch.logsumexp(torch.stack([x for x in lses if x is not None]), dim=0)
        total = total.masked_fill(torch.isneginf(total), 0)
        shares = [torch.exp(x - total)[:, :, r0:r1, None] for x in lses if x is not None]
        return torch.stack(
            [share * slab(child, c, r0, r1) for child, share in zip(m.children, shares, strict=True)]
        ).sum(0)
    if isinstance(m, Mixer):
        raise NotSupported(f"{m} has no weight for a single pair; ask for the output alone")
    assert isinstance(m, Pairwise | Recurrent)
    mapped = map_tokens(m.tokens, c, c.k.shape[2])
    wide = torch.promote_types(c.q.dtype, torch.float32)
    if isinstance(m, Recurrent):
        mapped = without_padding(mapped)
        mask = c.mask if c.mask is None or c.mask.shape[2] == 1 else c.mask[:, :, r0:r1]
        cut = replace(mapped, q=mapped.q[:, :, r0:r1].to(wide), k=mapped.k.to(wide), mask=mask)
        if c.offset is None:
            raise NotSupported(
                "weights of a recurrent mechanism for a ragged call with fewer queries than keys; ask sample by sample"
            )
        return recurrent_weights(m, replace(cut, offset=c.offset + r0))[0]
    if m.heads is not None and m.heads.learned_query:
        mapped = replace(mapped, q=mapped.q.expand(-1, -1, mapped.k.shape[2], -1), offset=0)
    if m.summary is not None:
        raise NotSupported(
            f"{m} weighs {m.summary.rows(c.k.shape[2])} summaries, not the {c.k.shape[2]} keys; ask for the output alone"
        )
    program = Program.bind(m, mapped)
    if any(isinstance(x, Buckets) for x in program.selections.values()):
        raise NotSupported(
            f"{m} averages over the buckets that took a token; ask for `selection` to see them"
        )
    spans = [(0, program.keys)]
    w, lse = program.weights(program.tile(slice(r0, r1), spans))
    if m.slots is None:
        return w
    assert lse is not None
    like = mapped.v.new_zeros(*mapped.q.shape[:3], 1)
    _, taken = m.slots.partial(mapped, like)
    return w * torch.exp(lse - torch.logaddexp(lse, taken[:, :, r0:r1])).unsqueeze(-1)


def selection(m: Mechanism, c: Context) -> Selection | None:
    """What the mechanism chose by content, or None where position alone decides."""
    if isinstance(m, Mixer):
        return m.select(without_padding(c))
    if not isinstance(m, Pairwise):
        return None
    selects = [p for p in m.pairs.leaves() if isinstance(p, Select)]
    if not selects:
        return None
    return Program.bind(m, map_tokens(m.tokens, c, c.k.shape[2])).selections[selects[0]]


def _rows(m: Mechanism, c: Context) -> int:
    return c.k.shape[2] if m.learned_query else c.q.shape[2]


def _index(what: str, n: int, size: int) -> int:
    if not -size <= n < size:
        raise ValueError(f"{what} {n} does not exist; there are {size}")
    return n % size
