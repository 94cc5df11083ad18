"""Sequences of many lengths side by side in one row, each read by itself.

Sequences of one length, and those within an eighth of it where no state is asked for, are stacked and run as one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism
from saccade.mechanism import mechanism as parse
from saccade.parts.state import State
from saccade.plan.advance import init_state
from saccade.plan.attend import Attended, attend

SLACK = 8  # a stack holds sequences whose padding is at most this part of the longest


@dataclass(frozen=True)
class Stack:
    """Sequences that run together: their numbers, where their tokens stand (count, longest), and which places hold one."""

    members: tuple[int, ...]
    index: Tensor
    valid: Tensor
    lengths: Tensor


def bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Starts and the end of the sequences, checked; raises ValueError or TypeError where they do not cover `tokens`."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype.is_floating_point or cu_seqlens.dim() != 1:
        raise TypeError(f"cu_seqlens must be an integer tensor (sequences + 1,), got {cu_seqlens!r}")
    ends: list[int] = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must ascend from 0 to the {tokens} tokens of the row, got {ends}")
    return ends


def stacks(ends: list[int], device: torch.device, states: Sequence[State] | None, exact: bool) -> list[Stack]:
    """The sequences that are not empty, stacked; `exact` stacks equal lengths alone, with states as long as each other."""
    lengths = [b - a for a, b in pairwise(ends)]

    def key(n: int) -> tuple[int, int]:
        return (lengths[n], states[n].length if states is not None else 0)

    runs: list[list[int]] = []
    for n in sorted((n for n, length in enumerate(lengths) if length), key=key, reverse=True):
        first = runs[-1][0] if runs else None
        joins = first is not None and (
            key(n) == key(first) if exact else SLACK * (lengths[first] - lengths[n]) <= lengths[first]
        )
        if joins:
            runs[-1].append(n)
        else:
            runs.append([n])
    found = []
    for run in runs:
        own = torch.tensor([lengths[n] for n in run], device=device)
        starts = torch.tensor([ends[n] for n in run], device=device)
        places = torch.arange(lengths[run[0]], device=device)
        valid = places < own[:, None]
        index = starts[:, None] + torch.where(valid, places, 0)
        found.append(Stack(tuple(run), index, valid, own))
    return found


def joined(states: Sequence[State]) -> State:
    """States of one length as one state, side by side in the batch."""
    first = states[0]
    return State(
        {n: torch.cat([s.tensors[n] for s in states]) for n in first.tensors},
        first.length,
        first.start,
        tuple(joined([s.members[n] for s in states]) for n in range(len(first.members))),
    )


class Ragged(NamedTuple):
    """What `attend_ragged` answers: out (1, H, n, E), and where asked for lse (1, H, n) and a state for each sequence."""

    out: Tensor
    lse: Tensor | None = None
    states: tuple[State, ...] | None = None


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    cu_seqlens: Tensor,
    *,
    states: Sequence[State] | None = None,
    need: Sequence[str] = ("out",),
    params: dict[str, Tensor] | None = None,
    streams: dict[str, Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
    kernel: str | None = None,
) -> Ragged:
    """Attention of sequences that stand side by side in one row: none reads another, positions and states start anew in each.

    q (1, H, n, D), k (1, G, n, D), v (1, G, n, E), streams (1, H, n, ...). Sequence i holds the tokens `cu_seqlens[i]` up to
    `cu_seqlens[i + 1]`; `cu_seqlens` (sequences + 1,) ascends from 0 to n.

    states: what an earlier call returned, one for each sequence; need: any of out, lse, state. Other arguments as in
    `attend`, and the same errors.

    >>> q = k = v = torch.ones(1, 2, 7, 4)
    >>> attend_ragged(q, k, v, "causal + linear", torch.tensor([0, 3, 7]), need=("out", "state")).states[1].length
    4
    """
    m = parse(mechanism)
    words = set(need) | {"out"}
    if words - {"out", "lse", "state"}:
        raise NotSupported(
            f"need may name out, lse and state for ragged rows, got {', '.join(sorted(words))}; call attend for one sequence"
        )
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            "ragged rows have a batch of one, and as many queries as keys: expected q (1, H, n, D) and k (1, G, n, D), got "
            f"{tuple(q.shape)} and {tuple(k.shape)}; use key_lengths of attend for padded samples"
        )
    ends = bounds(cu_seqlens, q.shape[2])
    count = len(ends) - 1
    if states is not None and len(states) != count:
        raise ValueError(f"{count} sequences go on from {count} states, got {len(states)}")
    keeps = "state" in words or states is not None
    if keeps:
        fresh = init_state(
            m, 1, k.shape[1], k.shape[3], v.shape[3], heads=q.shape[1], dtype=k.dtype, device=k.device
        )
        states = [fresh] * count if states is None else list(states)
        words |= {"state"}
    out = v.new_zeros(q.shape[1], q.shape[2], v.shape[-1])
    lse = (
        q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))[0]
        if "lse" in words
        else None
    )
    after = list(states or ())
    for stack in stacks(ends, q.device, states, keeps):

        def take(x: Tensor, index: Tensor = stack.index) -> Tensor:
            return x[0][:, index].transpose(0, 1)

        padded = not bool(stack.valid.all())
        made = attend(
            take(q),
            take(k),
            take(v),
            m,
            key_lengths=stack.lengths if padded else None,
            state=joined([after[n] for n in stack.members]) if keeps else None,
            need=(*sorted(words), "out"),
            params=params,
            streams=None if streams is None else {n: take(x) for n, x in streams.items()},
            buffers=buffers,
            kernel=kernel,
        )
        answer = Attended(made) if isinstance(made, Tensor) else made
        at = stack.index[stack.valid]
        out = out.index_copy(1, at, answer.out.transpose(0, 1)[:, stack.valid])
        if lse is not None and answer.lse is not None:
            lse = lse.index_copy(1, at, answer.lse.transpose(0, 1)[:, stack.valid])
        if answer.state is not None:
            for row, n in enumerate(stack.members):
                after[n] = answer.state.select(torch.tensor([row], device=q.device))
    kept = tuple(after) if "state" in need else None
    return Ragged(out[None], None if lse is None else lse[None], kept)
