"""Decoding over coded keys: a count and a sum of values a code, and the latest tokens one by one.

Legend: b batch, g key-value heads, S codes, B tokens of a block, R latest tokens, fewer than 2 B.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.kernels.codes import Past, obstacles, read, tally
from saccade.mechanism import Pairwise
from saccade.parts.codes import CodedDot, pick
from saccade.parts.pair import Context
from saccade.parts.state import State
from saccade.parts.tokens import On
from saccade.plan.choose import finish
from saccade.plan.place import zeros


@functools.lru_cache(maxsize=256)
def keeps_codes(m: Pairwise) -> bool:
    """True where a state needs no key that is more than two blocks old."""
    return isinstance(m.score, CodedDot) and not obstacles(m)


def init_codes(
    m: Pairwise,
    batch: int,
    sizes: dict[On, tuple[int, int]],
    dtype: torch.dtype,
    device: str | torch.device,
    tails: dict[str, Tensor],
) -> State:
    """The state before the first token: count (b, g, S) and total (b, g, S, e); code (b, g, R, 1) and v (b, g, R, e)."""
    assert isinstance(m.score, CodedDot)
    (g, e), codes = sizes["v"], m.score.codes
    wide = torch.promote_types(dtype, torch.float32)
    return State(
        {
            "count": torch.zeros(batch, g, codes, dtype=wide, device=device),
            "total": torch.zeros(batch, g, codes, e, dtype=wide, device=device),
            "code": torch.empty(batch, g, 0, 1, dtype=torch.long, device=device),
            "v": torch.empty(batch, g, 0, e, dtype=dtype, device=device),
        }
        | tails
    )


def advance_codes(
    m: Pairwise, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    """New tokens, mapped already, after a state: block by block. Keys of earlier calls pass no gradient on."""
    if kernel not in (None, "codes"):
        raise NotSupported(f"with a state, {m} is run by codes, but the call demands {kernel}; leave it out")
    if c.q.shape[2] != c.k.shape[2]:
        raise ValueError(
            f"with a state every new token brings its query: got {c.q.shape[2]} queries and {c.k.shape[2]} keys"
        )
    if c.mask is not None:
        raise NotSupported(
            f"the state of {m} cannot follow a mask of single pairs; use key_lengths for padding"
        )
    if not c.q.shape[2]:
        return *zeros(m, c, lse), state
    assert isinstance(m.score, CodedDot)
    block, codes = m.score.block, m.score.codebook(c)
    index, keys = m.score.coded(c)
    q = m.score.scaled(c.q.to(keys.dtype))
    past, start = Past(state.tensors["count"], state.tensors["total"]), state.start
    near, v = state.tensors["code"].squeeze(-1), torch.cat((state.tensors["v"], c.v), 2)
    keys = torch.cat((pick(codes, near), keys), 2)
    near = torch.cat((near, index), 2)
    at, last = state.length, state.length + c.q.shape[2]
    found = []
    while at < last:
        drop = max(0, at // block - 1) * block - start
        if drop:
            left = tally(near[:, :, :drop], v[:, :, :drop].to(keys.dtype), m.score.codes)
            past, start = Past(past.count + left.count, past.total + left.total), start + drop
            near, keys, v = near[:, :, drop:], keys[:, :, drop:], v[:, :, drop:]
        stop = min(last, (at // block + 1) * block)
        i, j = (torch.arange(x, stop, device=q.device) for x in (at, start))
        seen = slice(0, stop - start)
        rows = q[:, :, at - state.length : stop - state.length]
        found.append(read(m, c, rows, past, (keys[:, :, seen], v[:, :, seen].to(keys.dtype)), i, j))
        at = stop
    out, found_lse = (torch.cat(x, 2) for x in zip(*found, strict=True))
    kept = {
        "count": past.count,
        "total": past.total,
        "code": near.unsqueeze(-1).clone(),
        "v": v.clone(),
    } | {n: x.clone() for n, x in c.tails.items()}
    after = replace(state, tensors=kept, length=last, start=start)
    out, answered = finish(m, c, out.to(c.q.dtype), found_lse)
    return out, answered if lse else None, after
