"""Launches of the Triton kernels for a state that tokens overwrite, and the differentiable step made of them.

Once it is known what each token writes, u, the rest is a state that tokens add to, with u for values. Legend: as in `state_run`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import sparse_run, state_run
from saccade.kernels.sparse_run import Launch, padded, ready, strides
from saccade.kernels.state_run import Cut, Form, Inputs

TABLE = {"prepare": Launch(64, 128, 4, 1), "solve": Launch(64, 32, 4, 3)}
State = tuple[Tensor, Tensor]


def launch(kind: str, x: Tensor) -> Launch:
    """Tokens of a chunk, columns of a tile, warps and stages."""
    if not x.is_cuda or x.dtype.itemsize > 2:
        return Launch(16, 16, 4, 1)
    return TABLE[kind]


def written(
    x: Inputs, beta: Tensor, first: State | None, parts: Cut, final: bool, back: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(what each token writes (b, g, L, e), the states that segments begin with (b g, P, m, e), the last one (b, g, m, e) or None).

    `back` solves the transposed system, from the gradients x.v of what is written; then there are no states.
    """
    from saccade.kernels import delta_triton

    b, _, g, n, m, e = x.sizes
    wide, device = torch.promote_types(x.q.dtype, torch.float32), x.q.device
    run = launch("prepare", x.q)
    chunks = -(-n // run.rows)
    u = torch.empty(b, g, n, e, dtype=x.k.dtype, device=device)
    w, y = (torch.empty(b, g, n, m, dtype=x.k.dtype, device=device) for _ in range(2))
    keep = torch.empty(b * g, chunks, dtype=wide, device=device) if x.decay else u
    sizes = {"DIM": m, "EDIM": e, "DECAY": x.decay, "WIDE": sparse_run.wide(x.q)}
    delta_triton.prepare[(chunks * b * g,)](
        x.k, x.v, beta, x.logs, x.ends, u, w, y, keep, *strides(x.k, x.v), *x.steps, g, n, chunks,
        C=run.rows, STEPS=run.rows.bit_length() - 1, D=padded(m), E=padded(e), FIXED=x.fixed, BACK=back,
        LOW=x.q.dtype.itemsize == 2, **sizes, **run.options,
    )  # fmt: skip
    rows, run = run.rows, launch("solve", x.q)
    columns = min(run.keys, padded(e))
    states = u if back else torch.empty(b * g, parts.count, m, e, dtype=wide, device=device)
    last = torch.empty(b, g, m, e, dtype=wide, device=device) if final else u
    delta_triton.solve[(-(-e // columns) * b * g,)](
        u, w, y, keep, u if first is None else first[0].contiguous(), states, last, n, chunks, parts.tokens // rows,
        parts.count, C=rows, D=padded(m), E=columns, GIVEN=first is not None, FINAL=final, BACK=back,
        **sizes, **run.options,
    )  # fmt: skip
    return u, None if back else states, last if final else None


def forward(
    x: Inputs, beta: Tensor, first: State | None, final: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out (b, h, L, e), what each token writes (b, g, L, e), the last state or None)."""
    b, h, _, n, *_ = x.sizes
    parts = state_run.cut(n, b * h, x.q.device)
    u, states, last = written(x, beta, first, parts, final)
    assert states is not None
    return state_run.outputs(replace(x, v=u), parts, (states, states)), u, last


def backward(
    x: Inputs,
    beta: Tensor,
    first: State | None,
    u: Tensor,
    grad: Tensor,
    after: State | None,
    last: State | None,
) -> tuple[state_run.Grads, Tensor]:
    """Gradients of q, k, v, the log decay and the first state, and of beta."""
    b, h, _, n, *_ = x.sizes
    wide = torch.promote_types(x.q.dtype, torch.float32)
    read = state_run.backward(replace(x, v=u), first, Form(), grad, None, after, last)
    parts = state_run.cut(n, b * h, x.q.device)
    free = written(replace(x, v=ready(read.v)), beta, None, parts, False, back=True)[0]
    dv = free * beta.unsqueeze(-1)
    gained = (free.to(wide) * u.to(wide)).sum(-1)
    dbeta = gained / beta.clamp_min(torch.finfo(beta.dtype).tiny)
    removed = (-dv).to(x.k.dtype)
    own = state_run.backward(
        replace(x, q=x.k, v=u), first, Form(), removed, None, None, None, values=first is not None
    )
    twice = 2 * (gained * beta).unsqueeze(-1) * x.k
    dk = read.k.to(wide) + own.q + own.k + twice
    dlog = read.log + own.log if read.log is not None and own.log is not None else None
    start = None
    if read.first is not None and own.first is not None:
        start = read.first[0] + own.first[0], read.first[1]
    return state_run.Grads(read.q, dk.to(x.k.dtype), dv.to(x.v.dtype), dlog, start), dbeta


class Attend(torch.autograd.Function):
    """A state overwritten and read along a sequence as one differentiable step; saves its inputs and what tokens write."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log: Tensor | None,
        s: Tensor | None,
        z: Tensor | None,
        ends: Tensor,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, u, last = forward(
            Inputs(q, k, v, log, ends), beta, None if s is None or z is None else (s, z), final
        )
        ctx.save_for_backward(q, k, v, beta, log, s, z, ends, u, last)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log, s, z, ends, u, last = ctx.saved_tensors
        given, after = grads
        grad = (
            torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=q.device) if given is None else given
        )
        held = ended = None
        if after is not None:
            none = after.new_zeros(after.shape[:3])
            held, ended = (after, none), (last, none)
        first = None if s is None else (s, z)
        found, dbeta = backward(Inputs(q, k, v, log, ends), beta, first, u, ready(grad), held, ended)
        start = found.first or (None, None)
        return found.q, found.k, found.v, dbeta, found.log, start[0], None, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log: Tensor | None,
    first: State | None,
    ends: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out (b, h, L, e), last state or None) of keys that overwrite at strength beta (b, g, L); the rest as in `state_run.attend`."""
    q, k, v, beta = ready(q), ready(k), ready(v), beta.contiguous()
    log = None if log is None else log.contiguous()
    tensors = [q, k, v, beta, log, *(first or (None, None))]
    found = state_run.ends_of(ends, q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return Attend.apply(*tensors, found, final)
    out, _, last = forward(Inputs(q, k, v, log, found), beta, first, final)
    return out, last
