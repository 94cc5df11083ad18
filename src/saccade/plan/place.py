"""A call as kernels are asked for it: where its queries stand, its sizes, and the answer when there is nothing to read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.cost import Request, Shape
from saccade.mechanism import Mechanism, Pairwise
from saccade.parts.heads import LEARNED
from saccade.parts.pair import Context
from saccade.plan.choose import finish


def place(m: Mechanism, c: Context) -> Context:
    """Where the queries stand: at the end of the keys."""
    rows, keys = c.q.shape[2], c.k.shape[2]
    if m.learned_query:
        return c
    if c.ends is None:
        return replace(c, offset=keys - rows)
    return replace(c, offset=0 if rows == keys and m.source("q") != LEARNED else None)


def request(c: Context, lse: bool, decoding: bool = False) -> Request:
    """What the plan is asked for a context."""
    b, h, rows, d = c.q.shape
    grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (c.q, c.k, c.v, *c.params.values(), *c.streams.values())
    )
    shape = Shape(b, h, rows, d, c.k.shape[1], c.k.shape[2], c.v.shape[-1])
    return Request(
        shape, c.q.device.type, c.q.dtype, grad, lse, c.mask is not None, c.ends is not None, decoding
    )


def empty_answer(m: Mechanism, c: Context, lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """The answer when there is no query, no key or no sample."""
    if c.q.numel() and c.k.numel() and c.v.numel():
        return None
    slots = isinstance(m, Pairwise) and m.slots is not None
    out, found = finish(m, c, *zeros(m, c, lse or slots))
    return out, found if lse else None


def zeros(m: Mechanism, c: Context, lse: bool) -> tuple[Tensor, Tensor | None]:
    """Zeros and lse = -inf in the shape of the answer."""
    rows = c.k.shape[2] if m.learned_query else c.q.shape[2]
    out = c.q.new_zeros(c.q.shape[0], c.q.shape[1], rows, c.v.shape[-1])
    out = out + sum(x[..., :0].sum() for x in (c.q, c.k, c.v))
    wide = torch.promote_types(c.q.dtype, torch.float32)
    return out, torch.full(out.shape[:3], -torch.inf, dtype=wide, device=out.device) if lse else None
