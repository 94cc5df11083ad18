"""Launches of the Triton kernels for a state that tokens add to, and the differentiable step made of them.

Legend: b batch, h query heads, g state heads, m feature size, e value size, P segments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import sparse_run
from saccade.kernels.sparse_run import Launch, padded, ready, strides

FILL = 264  # programs of one head's two halves that fill an H100 twice
LEAST = 256  # tokens of a segment


@dataclass(frozen=True)
class Form:
    """What a state is asked: a sum of weights to divide by, elu(x) + 1 mapped on the way, the state after the last token."""

    ratio: bool = False
    elu: bool = False
    final: bool = False


@dataclass(frozen=True)
class Cut:
    """Segments of `tokens` tokens, `count` of them."""

    tokens: int
    count: int


def cut(length: int, stacks: int, device: torch.device) -> Cut:
    """As many segments as keep a GPU busy."""
    if device.type != "cuda":
        return Cut(32, -(-length // 32))
    most = max(1, FILL // (2 * stacks))
    tokens = max(LEAST, -(-length // (most * 128)) * 128)
    return Cut(tokens, -(-length // tokens))


TABLE = {
    "sums": Launch(64, 64, 4, 3),
    "values": Launch(64, 64, 4, 2),
    "features": Launch(64, 64, 4, 2),
    "chunks": Launch(64, 64, 4, 1),
}
PROGRAMS = 528  # that take chunks in turn


def launch(kind: str, x: Tensor) -> Launch:
    """Tokens of a chunk, columns of a tile, warps and stages."""
    if not x.is_cuda:
        return Launch(16, 16, 4, 1)
    if x.dtype.itemsize > 2:
        return Launch(16, 16, 4, 1)
    return TABLE[kind]


@functools.lru_cache(maxsize=64)
def _whole(length: int, device: str) -> Tensor:
    return torch.tensor([length], dtype=torch.int32, device=device)


def ends_of(ends: Tensor | None, q: Tensor) -> Tensor:
    """How many tokens of each sample are no padding, (b,) or (1,) int32."""
    return _whole(q.shape[2], str(q.device)) if ends is None else ends.to(torch.int32)


@dataclass(frozen=True)
class Inputs:
    """Mapped queries (b, h, L, m), keys (b, g, L, m), values (b, g, L, e), log decay and the ends of the samples."""

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor | None
    ends: Tensor

    @property
    def decay(self) -> int:
        """None, one number a token, or one a channel."""
        return 0 if self.log is None else 1 if self.log.shape[-1] == 1 else 2

    @property
    def fixed(self) -> bool:
        """Whether all tokens decay alike."""
        return self.log is not None and self.log.shape[2] == 1

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        (b, h, n, m), g = self.q.shape, self.k.shape[1]
        return b, h, g, n, m, self.v.shape[-1]

    @property
    def steps(self) -> list[int]:
        """Strides of the ends and of a log decay with one number a token."""
        return [int(self.ends.shape[0] > 1), *log_strides(self.log)]

    @property
    def logs(self) -> Tensor:
        return self.q if self.log is None else self.log


def log_strides(log: Tensor | None) -> list[int]:
    return [0, 0, 0] if log is None else [s if n > 1 else 0 for n, s in zip(log.shape[:3], log.stride()[:3])]


@dataclass(frozen=True)
class Chunks:
    """What `channel_triton` prepares: products (b h, N, C, C), decayed q and k, and what survives chunks (b g, N, m)."""

    a: Tensor
    q: Tensor
    k: Tensor
    keep: Tensor
    fall: Tensor


def prepared(x: Inputs) -> Chunks:
    """Everything inside the chunks of a decay by channel."""
    from saccade.kernels import channel_triton

    b, h, g, n, m, _ = x.sizes
    run = launch("chunks", x.q)
    chunks = -(-n // run.rows)
    wide = _wide(x.q)
    found = Chunks(
        torch.empty(b * h, chunks, run.rows, run.rows, dtype=x.v.dtype, device=x.q.device),
        torch.empty(x.q.shape, dtype=x.v.dtype, device=x.q.device),
        torch.empty(x.k.shape, dtype=x.v.dtype, device=x.q.device),
        torch.empty(b * g, chunks, m, dtype=wide, device=x.q.device),
        torch.empty(b * g, chunks, m, dtype=wide, device=x.q.device),
    )
    total = chunks * b * h
    programs = min(total, PROGRAMS)
    columns = min(run.keys, padded(m))
    scratch = torch.empty(programs, run.rows, columns, dtype=wide, device=x.q.device)
    channel_triton.prepare[(programs,)](
        x.q, x.k, x.log, x.ends, found.a, found.q, found.k, found.keep, found.fall, scratch,
        *strides(x.q, x.k), *log_strides(x.log), x.steps[0], h, g, n, chunks, total, programs,
        C=run.rows, STEPS=run.rows.bit_length() - 1, D=columns, DIM=m, WIDE=sparse_run.wide(x.q), **run.options,
    )  # fmt: skip
    return found


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _falls(x: Inputs, parts: Cut, ready_chunks: Chunks | None) -> Tensor:
    """Logarithm of what survives each segment, (b g, P, 1 or m)."""
    b, _, g, n, *_ = x.sizes
    if ready_chunks is not None:
        each = parts.tokens // launch("chunks", x.q).rows
        fall = ready_chunks.fall
        short = -fall.shape[1] % each
        return torch.nn.functional.pad(fall, (0, 0, 0, short)).unflatten(1, (-1, each)).sum(2)
    assert x.log is not None
    log = x.log[..., 0].to(_wide(x.q)).expand(b, g, n)
    short = -n % parts.tokens
    return torch.nn.functional.pad(log, (0, short)).unflatten(2, (-1, parts.tokens)).sum(3).view(b * g, -1, 1)


def states(
    x: Inputs,
    parts: Cut,
    first: tuple[Tensor, Tensor] | None,
    form: Form,
    chunks: Chunks | None,
    back: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The state (b g, P, m, e) and sum of features (b g, P, m) that each segment begins with; None where all are zero.

    `back` holds gradients of values and of sums of weights: then the gradients of the states that segments end with, a
    query head each, from `first`, that of the last.
    """
    from saccade.kernels import state_triton

    b, h, g, n, m, e = x.sizes
    wide = _wide(x.q)
    if parts.count == 1:
        if first is None:
            return None
        return first[0].reshape(-1, 1, m, e).contiguous(), first[1].reshape(-1, 1, m).contiguous()
    run = _run("sums", x)
    heads, groups, writer, values = g, g, x.k, x.v
    if chunks is not None:
        writer = chunks.k
    extra = x.q
    if back is not None:
        heads, groups, writer, values, extra = h, g, x.q if chunks is None else chunks.q, back[0], back[1]
    s = torch.empty(b * heads, parts.count, m, e, dtype=wide, device=x.q.device)
    z = torch.empty(b * heads, parts.count, m, dtype=wide, device=x.q.device)
    columns = min(run.keys, padded(e))
    state_triton.segment_sums[(-(-e // columns) * parts.count * b * heads,)](
        writer, values, extra, x.logs, x.q if chunks is None else chunks.keep, x.ends, s, z,
        *strides(writer, values), *x.steps, heads, groups, n, -(-n // run.rows), parts.tokens // run.rows, parts.count,
        C=run.rows, D=padded(m), DIM=m, E=columns, EDIM=e, DECAY=x.decay, FIXED=x.fixed, RATIO=form.ratio, BACK=back is not None,
        ELU=form.elu, WIDE=sparse_run.wide(x.q), **run.options,
    )  # fmt: skip
    fall = x.q if x.log is None else _falls(x, parts, chunks)
    given = first if first is not None else (s, z)
    for held, start, size in ((s, given[0], e), (z, given[1], 1)):
        if size == 1 and held is z and not form.ratio:
            continue
        block = min(1024, padded(m * size))
        steps = (
            [0, 0, 0]
            if x.log is None
            else [fall.shape[1] * fall.shape[2], fall.shape[2], int(fall.shape[2] > 1)]
        )
        state_triton.between[(-(-m * size // block) * b * heads,)](
            held, start.contiguous(), fall, parts.count, heads // g, *steps,
            N=block, DIM=m, EDIM=size, DECAY=x.decay > 0, BACK=back is not None, GIVEN=first is not None,
            WIDE=sparse_run.wide(x.q), num_warps=4,
        )  # fmt: skip
    return s, z


def forward(
    x: Inputs, first: tuple[Tensor, Tensor] | None, form: Form
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(out (b, h, L, e), sums of weights (b, h, L) or None, the last state and sum of features or None)."""
    b, h, g, n, m, e = x.sizes
    wide, device = _wide(x.q), x.q.device
    parts = cut(n, b * h, device)
    chunks = prepared(x) if x.decay == 2 else None
    begin = states(x, parts, first, form, chunks)
    q, k, a, keep = _readers(x, chunks)
    out = torch.empty(b, h, n, e, dtype=x.v.dtype, device=device)
    total = torch.empty(b, h, n, dtype=wide, device=device) if form.ratio else out
    last = torch.empty(b, g, m, e, dtype=wide, device=device) if form.final else out
    lastz = torch.zeros(b, g, m, dtype=wide, device=device) if form.final else out
    _values(x, (q, k, x.v), a, keep, parts, begin, (out, total, last, lastz), form, False)
    return out, total if form.ratio else None, (last, lastz) if form.final else None


def _readers(x: Inputs, chunks: Chunks | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys as states meet them, the products inside chunks, and what survives a chunk."""
    return (x.q, x.k, x.q, x.q) if chunks is None else (chunks.q, chunks.k, chunks.a, chunks.keep)


def _run(kind: str, x: Inputs) -> Launch:
    """A launch in the chunks that were prepared."""
    run = launch(kind, x.q)
    return replace(run, rows=launch("chunks", x.q).rows) if x.decay == 2 else run


def _values(
    x: Inputs,
    given: tuple[Tensor, Tensor, Tensor],
    a: Tensor,
    keep: Tensor,
    parts: Cut,
    begin: tuple[Tensor, Tensor] | None,
    into: tuple[Tensor, Tensor, Tensor, Tensor],
    form: Form,
    back: bool,
) -> None:
    from saccade.kernels import state_triton

    b, h, g, n, m, e = x.sizes
    run = _run("values", x)
    columns = min(run.keys, padded(e))
    s, z = begin if begin is not None else (a, a)
    state_triton.values[(-(-e // columns) * parts.count * b * h,)](
        *given, a, x.logs, keep, x.ends, s, z, *into,
        *strides(*given), *x.steps, h, g, n, -(-n // run.rows), parts.tokens // run.rows, parts.count,
        C=run.rows, D=padded(m), DIM=m, E=columns, EDIM=e, DECAY=x.decay, FIXED=x.fixed, RATIO=form.ratio and not back, ELU=form.elu,
        GIVEN=begin is not None, FINAL=form.final, BACK=back, WIDE=sparse_run.wide(x.q), **run.options,
    )  # fmt: skip


def _features(
    x: Inputs,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    extra: Tensor,
    keep: Tensor,
    parts: Cut,
    begin: tuple[Tensor, Tensor] | None,
    into: tuple[Tensor, Tensor],
    form: Form,
    back: bool,
) -> Tensor | None:
    """Fill a gradient; the products of phi with it, (b, h, L), where decay is one number a token."""
    from saccade.kernels import state_triton

    b, h, g, n, m, e = x.sizes
    run = _run("features", x)
    columns = min(run.keys, padded(m))
    blocks = -(-m // columns)
    dots = x.q
    if x.decay == 1:
        dots = torch.empty(b, h, blocks, n, dtype=_wide(x.q), device=x.q.device)
    s, z = begin if begin is not None else (x.q, x.q)
    state_triton.features[(blocks * parts.count * b * h,)](
        *given, extra, x.logs, keep, x.ends, s, z, into[0], dots, into[1],
        *strides(*given), *x.steps, h, g, n, -(-n // run.rows), parts.tokens // run.rows, parts.count,
        C=run.rows, D=columns, DIM=m, E=padded(e), EDIM=e, DECAY=x.decay, FIXED=x.fixed, RATIO=form.ratio, ELU=form.elu,
        GIVEN=begin is not None, FINAL=form.final, BACK=back, WIDE=sparse_run.wide(x.q), **run.options,
    )  # fmt: skip
    return dots.sum(2) if x.decay == 1 else None


def outputs(x: Inputs, parts: Cut, begin: tuple[Tensor, Tensor]) -> Tensor:
    """Out (b, h, L, e), given the states that segments begin with."""
    out = torch.empty(*x.q.shape[:3], x.v.shape[-1], dtype=x.v.dtype, device=x.q.device)
    _values(x, (x.q, x.k, x.v), x.q, x.q, parts, begin, (out, out, out, out), Form(), False)
    return out


@dataclass(frozen=True)
class Grads:
    """Gradients of q, k (b, g, L, m) and v, of the log decay where there is one, and of the first state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor | None
    first: tuple[Tensor, Tensor] | None


def _by_group(x: Tensor, g: int) -> Tensor:
    """The sum over the query heads of each state head, (b, h, ...) to (b, g, ...)."""
    return x if x.shape[1] == g else x.unflatten(1, (g, -1)).sum(2)


def backward(
    x: Inputs,
    first: tuple[Tensor, Tensor] | None,
    form: Form,
    grad: Tensor,
    extra: Tensor | None,
    after: tuple[Tensor, Tensor] | None,
    last: tuple[Tensor, Tensor] | None,
    values: bool = True,
) -> Grads:
    """All gradients, given those of the sums of values, of the sums of weights, and of the last state, with that state.

    Without `values` those of v and of the first state are left out, and v stands for its own.
    """
    b, h, g, n, m, e = x.sizes
    wide, device = _wide(x.q), x.q.device
    parts = cut(n, b * h, device)
    chunks = prepared(x) if x.decay == 2 else None
    begin = states(x, parts, first, form, chunks)
    more = grad if extra is None else extra
    spread = None
    if after is not None:  # the gradient of a shared state goes to one of the heads that share it
        spread = tuple(
            torch.cat((t.unsqueeze(2), t.new_zeros(b, g, h // g - 1, *t.shape[2:])), 2).flatten(1, 2)
            for t in after
        )
    end = states(x, parts, spread, form, chunks, (grad, more))  # type: ignore[arg-type]
    q, k, a, keep = _readers(x, chunks)
    own = x.k.dtype if h == g else wide
    dq = torch.empty(b, h, n, m, dtype=x.q.dtype, device=device)
    dk = torch.empty(b, h, n, m, dtype=own, device=device)
    dv = torch.empty(b, h, n, e, dtype=own, device=device) if values else dk
    start = torch.empty(b, h, m, e, dtype=wide, device=device) if first is not None else dk
    startz = torch.zeros(b, h, m, dtype=wide, device=device) if first is not None else dk
    plain, told = replace(form, final=False), replace(form, final=first is not None)
    if values:
        _values(x, (k, q, grad), a, keep, parts, end, (dv, dv, start, startz), told, True)
    dots = _features(x, (grad, x.v, k, x.q), more, keep, parts, begin, (dq, dq), plain, False)
    kdots = _features(x, (x.v, grad, q, x.k), more, keep, parts, end, (dk, startz), told, True)
    dlog = None
    if chunks is not None:
        dlog = _finished(x, form, grad, more, dq, dk, after, last)
    elif dots is not None and kdots is not None:
        dlog = _log_gradient(x, _by_group(dots - kdots, g), after, last, form)
    firsts = (_by_group(start, g), _by_group(startz, g)) if first is not None else None
    return Grads(
        dq, _by_group(dk, g).to(x.k.dtype), _by_group(dv, g).to(x.v.dtype) if values else x.v, dlog, firsts
    )


def _finished(
    x: Inputs,
    form: Form,
    grad: Tensor,
    extra: Tensor,
    dq: Tensor,
    dk: Tensor,
    after: tuple[Tensor, Tensor] | None,
    last: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Add what pairs inside chunks bring to dq and dk, and answer the gradient of a log decay by channel."""
    from saccade.kernels import channel_triton

    b, h, g, n, m, e = x.sizes
    wide, device = _wide(x.q), x.q.device
    run = launch("chunks", x.q)
    chunks = -(-n // run.rows)
    total = chunks * b * h
    programs = min(total, PROGRAMS)
    columns = min(run.keys, padded(m))
    scratch = torch.empty(programs, run.rows, columns, dtype=wide, device=device)
    fell = torch.empty(b, h, n, m, dtype=wide, device=device)
    sums = torch.empty(b, h, chunks, m, dtype=wide, device=device)
    channel_triton.finish[(programs,)](
        x.q, x.k, x.v, grad, extra, x.log, x.ends, dq, dk, fell, sums, scratch, *strides(x.q, x.k, x.v, grad),
        *log_strides(x.log), x.steps[0], h, g, n, chunks, total, programs,
        C=run.rows, STEPS=run.rows.bit_length() - 1, D=columns, DIM=m, E=padded(e), EDIM=e, RATIO=form.ratio,
        WIDE=sparse_run.wide(x.q), **run.options,
    )  # fmt: skip
    fell, sums = _by_group(fell, g), _by_group(sums, g).transpose(2, 3).contiguous()
    later = sums.sum(-1, keepdim=True) - sums.cumsum(-1)
    if after is not None and last is not None:
        later = later + _held(after, last, form).unsqueeze(-1)
    later = later.transpose(2, 3).contiguous()
    channel_triton.add_later[(chunks * b * g,)](fell, later, n, chunks, C=run.rows, D=padded(m), DIM=m)
    return _as_log(x, fell)


def _held(after: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor], form: Form) -> Tensor:
    """The products of the last state with its gradient, (b, g, m)."""
    found = (after[0] * last[0]).sum(-1)
    return found + after[1] * last[1] if form.ratio else found


def _log_gradient(
    x: Inputs,
    fell: Tensor,
    after: tuple[Tensor, Tensor] | None,
    last: tuple[Tensor, Tensor] | None,
    form: Form,
) -> Tensor:
    """The gradient of the log decay: sums of q dq - k dk (b, g, L) from each token on, and what the last state holds."""
    sums = fell.cumsum(2)
    found = sums[:, :, -1:] - sums + fell
    if after is not None and last is not None:
        found = found + _held(after, last, form).sum(-1, keepdim=True)
    return _as_log(x, found.unsqueeze(-1))


def _as_log(x: Inputs, found: Tensor) -> Tensor:
    """Summed over what the log decay shares."""
    assert x.log is not None
    for dim in (0, 2):
        if x.log.shape[dim] == 1:
            found = found.sum(dim, keepdim=True)
    return found.to(x.log.dtype)


class Attend(torch.autograd.Function):
    """A state read and written along a sequence as one differentiable step; saves its inputs, out and the sums of weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log: Tensor | None,
        s: Tensor | None,
        z: Tensor | None,
        ends: Tensor,
        form: Form,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        first = None if s is None or z is None else (s, z)
        out, total, last = forward(Inputs(q, k, v, log, ends), first, form)
        ctx.save_for_backward(q, k, v, log, s, z, ends, out, total, *(last or (None, None)))
        ctx.form = form
        return (out, total, *(last or (None, None)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log, s, z, ends, out, total, last, lastz = ctx.saved_tensors
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        extra = None
        if ctx.form.ratio:
            safe = total.clamp_min(torch.finfo(total.dtype).tiny ** 0.8)
            extra = -(grad.to(total.dtype) * out.to(total.dtype)).sum(-1) / safe
            extra = torch.where(total == safe, extra, 0.0)
            if grads[1] is not None:
                extra = extra + grads[1]
            grad = (grad / safe.unsqueeze(-1)).to(out.dtype)
        after = None
        if last is not None and (grads[2] is not None or grads[3] is not None):
            after = tuple(
                torch.zeros_like(x) if d is None else d for x, d in zip((last, lastz), grads[2:], strict=True)
            )
        x = Inputs(q, k, v, log, ends)
        first = None if s is None else (s, z)
        held = None if last is None else (last, lastz)
        found = backward(x, first, ctx.form, ready(grad), extra, after, held)  # type: ignore[arg-type]
        start = found.first or (None, None)
        return found.q, found.k, found.v, found.log, *start, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor | None,
    first: tuple[Tensor, Tensor] | None,
    ends: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(out (b, h, L, e), sums of weights (b, h, L) or None, last state or None), differentiable where gradients are asked for.

    q (b, h, L, m), k (b, g, L, m), v (b, g, L, e), log (b or 1, g, L or 1, 1 or m) at most 0, `first` a state (b, g, m, e) with its
    sum of features (b, g, m), ends (b,) how many tokens of each sample are no padding.
    """
    q, k, v = ready(q), ready(k), ready(v)
    log = None if log is None else log.contiguous()
    if log is not None and log.shape[-1] > 1:
        log = log.expand(*log.shape[:2], q.shape[2], log.shape[3]).contiguous()
    tensors = [q, k, v, log, *(first or (None, None))]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, total, s, z = Attend.apply(*tensors, ends_of(ends, q), form)
        return out, total, None if s is None else (s, z)
    return forward(Inputs(q, k, v, log, ends_of(ends, q)), first, form)
