"""Decoding with lifetimes: a state that holds the tokens which some later query can still read.

Legend: b batch, h query heads, g key-value heads, C tokens held, n new ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise
from saccade.parts.algebra import Full
from saccade.parts.lifetime import FOREVER, GLOBAL, OPEN, Lifetime, LifetimeSoftmax, last_readers
from saccade.parts.mask import Causal
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, map_tokens
from saccade.parts.state import State
from saccade.plan.choose import make
from saccade.plan.place import empty_answer, request


def window_of(m: Pairwise) -> int | None:
    """The window of a mechanism whose tokens have lifetimes; None for any other."""
    for part in (*m.pairs.leaves(), m.normalizer):
        if isinstance(part, Lifetime | LifetimeSoftmax):
            return part.window
    return None


def init_lives(m: Pairwise, state: State, heads: int) -> State:
    """The empty state of a mechanism with lifetimes, from that of plain keys and values."""
    window = window_of(m)
    assert window is not None
    soft = isinstance(m.normalizer, LifetimeSoftmax) and not m.normalizer.hard
    if (
        soft
        or m.logits
        or m.value
        or any(p.past for p in m.tokens)
        or m.pairs not in (Causal(), Lifetime(window), Causal() & Lifetime(window))
    ):
        raise NotSupported(
            f"{m}: a state that drops tokens knows neither where the others stood nor the odds that they live; it runs "
            "`causal + lifetime(...)` or `causal + lifetime_softmax(...)` without logits, values of pairs and "
            "token maps that look back"
        )
    k = state.tensors["k"]
    last = torch.empty(k.shape[0], heads, 0, dtype=torch.int32, device=k.device)
    return replace(state, tensors=state.tensors | {"last": last})


def advance_lives(
    m: Pairwise, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    """A call that goes on from a state of living tokens and returns the next one."""
    window, new, seen = window_of(m), c.k.shape[2], state.length
    assert window is not None
    if c.q.shape[2] != new:
        raise ValueError(
            f"with a state every new token brings its query: got {c.q.shape[2]} queries and {new} keys"
        )
    if c.mask is not None:
        raise NotSupported(f"the state of {m} drops tokens, so a mask of single pairs cannot follow it")
    mapped = map_tokens(m.tokens, replace(c, offset=seen, start=seen), new)
    positions = mapped.j[0]
    types = c.streams["lifetime"].argmax(-1)
    fresh = last_readers(types, positions, window).to(torch.int32)
    held = _closed(state.tensors["last"], types, positions)
    i = positions[:, None]
    exist = torch.cat((i <= held.unsqueeze(-2), (i <= fresh.unsqueeze(-2)) & (positions <= i)), dim=-1)
    k, v = (torch.cat((state.tensors[n], x), 2) for n, x in (("k", mapped.k), ("v", mapped.v)))
    bare = replace(m, tokens=(), pairs=Full(), normalizer=Softmax())
    bound = replace(mapped, k=k, v=v, mask=exist, start=0, offset=k.shape[2] - new, streams={})
    empty = empty_answer(bare, bound, lse)
    out, found = empty if empty is not None else make(bare, request(bound, lse), kernel).run(bound)
    kept = _living(k, v, torch.cat((held, fresh), -1), seen + new)
    return out, found, State(kept, seen + new)


def _closed(last: Tensor, types: Tensor, positions: Tensor) -> Tensor:
    """The last readers (b, h, C) of held tokens: local ones end before the first new global one."""
    if not positions.numel():
        return last
    first = torch.where(types == GLOBAL, positions, FOREVER).amin(-1, keepdim=True)
    closing = (last == OPEN) & (first < FOREVER)
    return torch.where(closing, first - 1, last).to(torch.int32)


def _living(k: Tensor, v: Tensor, last: Tensor, following: int) -> dict[str, Tensor]:
    """Keys, values and last readers that a query at `following` or later can read; short heads are filled up with dead rows."""
    b, g, count, _ = k.shape
    alive = (last >= following).view(b, g, -1, count).any(2)
    room = int(alive.sum(-1).max()) if alive.numel() else 0
    order = (~alive).to(torch.int8).argsort(dim=-1, stable=True)[..., :room]
    dead = ~alive.gather(-1, order)
    shared = order.repeat_interleave(last.shape[1] // g, 1)
    gone = dead.repeat_interleave(last.shape[1] // g, 1)

    def rows(x: Tensor) -> Tensor:
        taken = x.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
        return taken.masked_fill(dead.unsqueeze(-1), 0)

    return {"k": rows(k), "v": rows(v), "last": last.gather(-1, shared).masked_fill(gone, -1)}
