"""Recurrent mechanisms in the native engine: a state in chunks of 64 tokens, or one token further, forward and backward.

Legend: b batch, g state heads, h query heads, n tokens, m feature size, e value size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade import native
from saccade.cost import Cost, Request, Shape
from saccade.kernels.base import Kernel
from saccade.kernels.native_choice import lined
from saccade.kernels.recurrent import Carry
from saccade.mechanism.values import Mechanism, Recurrent
from saccade.native import Array, Linear
from saccade.parts.decay import ChannelDecay
from saccade.parts.feature import Elu1, Identity
from saccade.parts.memory import RowRatio, log_total
from saccade.parts.pair import Context

LARGEST = 512
BEST = -1  # the instruction set: the best of the machine
CHUNK, EDGE, ROWS = 64, 16, 6  # tokens of a chunk, of a block that channels decay in, rows of a register tile
LEAST = torch.finfo(torch.float32).tiny ** 0.8  # as `divide` has it
FUSED = {Identity: 0, Elu1: 1}


@dataclass(frozen=True)
class Work:
    """All that a pass of the engine needs to know besides its tensors."""

    elu: int
    channels: bool
    overwrites: bool
    ratio: bool
    lengths: Tensor | None = None
    temperature: float = 0.0  # of channels that come as x of logsigmoid(x) / temperature

    @classmethod
    def of(cls, m: Recurrent, lengths: Tensor | None = None) -> Work:
        return cls(
            FUSED.get(type(m.feature), 0),
            m.decay is not None and m.decay.channels,
            m.write is not None and m.write.overwrites,
            isinstance(m.ratio, RowRatio),
            lengths,
        )

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, gain: Tensor | None, s: Tensor, z: Tensor
    ) -> Linear:
        """The engine's view of a pass."""
        b, h, n, m = q.shape
        call = Linear(
            bf16=q.dtype == torch.bfloat16,
            batch=b,
            heads=h,
            kv_heads=k.shape[1],
            rows=n,
            dim=m,
            value_dim=v.shape[-1],
            q=Array.of(q),
            k=Array.of(k),
            v=Array.of(v),
            s=s.data_ptr(),
            z=z.data_ptr(),
            lengths=None if self.lengths is None else self.lengths.data_ptr(),
            least=LEAST,
            elu=self.elu,
            channels=self.channels,
            overwrites=self.overwrites,
            isa=BEST,
            decay_rule=self.temperature > 0,
            temperature=self.temperature,
        )
        if log is not None:
            call.log = Array.of(log)
        if gain is not None:
            call.gain = Array.of(gain)
        return call


def forward(
    q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, gain: Tensor | None, s: Tensor, z: Tensor, work: Work
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out (b, h, n, e), sums of weights (b, h, n) or an empty tensor, the state after, its sum of features)`."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    total = s.new_empty(q.shape[:3] if work.ratio else 0)
    s_after = torch.empty_like(s)
    z_after = torch.empty_like(z)
    call = work.call(q, k, v, log, gain, s, z)
    call.out, call.s_after, call.z_after = Array.of(out), s_after.data_ptr(), z_after.data_ptr()
    call.total = total.data_ptr() if work.ratio else None
    native.run_linear(call, backward=False)
    return out, total, s_after, z_after


class Advance(torch.autograd.Function):
    """The engine's two passes as one differentiable step; saves its inputs, the output and the sums of weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log: Tensor | None,
        gain: Tensor | None,
        s: Tensor,
        z: Tensor,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, total, s_after, z_after = forward(q, k, v, log, gain, s, z, work)
        ctx.save_for_backward(q, k, v, log, gain, s, z, out, total)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out, total, s_after, z_after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log, gain, s, z, out, total = ctx.saved_tensors
        work: Work = ctx.work
        grad = torch.zeros_like(out) if grads[0] is None else lined(grads[0])
        dtotal, ds_after, dz_after = (None if x is None else x.contiguous() for x in grads[1:])
        call = work.call(q, k, v, log, gain, s, z)
        call.out, call.grad = Array.of(out), Array.of(grad)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        call.dq, call.dk, call.dv = Array.of(dq), Array.of(dk), Array.of(dv)
        dlog, dgain = (
            torch.empty(x.shape, dtype=x.dtype) if x is not None and ctx.needs_input_grad[at] else None
            for at, x in ((3, log), (4, gain))
        )
        if dlog is not None:
            call.dlog = Array.of(dlog)
        if dgain is not None:
            call.dgain = Array.of(dgain)
        ds, dz = (torch.empty_like(x) if ctx.needs_input_grad[at] else None for at, x in ((5, s), (6, z)))
        call.ds, call.dz, call.ds_after, call.dz_after, call.dtotal = (
            None if x is None else x.data_ptr() for x in (ds, dz, ds_after, dz_after, dtotal)
        )
        call.total = total.data_ptr() if work.ratio else None
        native.run_linear(call, backward=True)
        return dq, dk, dv, dlog, dgain, ds, dz, None


def refusals(m: Mechanism, device: str, dtype: torch.dtype, dim: int, value_dim: int) -> tuple[str, ...]:
    """Why the engine cannot take a mechanism further on such numbers; empty when it can."""
    return _refusals(native.reason(), m, device, dtype, dim, value_dim)


@functools.lru_cache(maxsize=4096)
def _refusals(
    engine: str, m: Mechanism, device: str, dtype: torch.dtype, dim: int, value_dim: int
) -> tuple[str, ...]:
    if not isinstance(m, Recurrent):
        return (f"runs recurrent mechanisms, this one is {m.family}",)
    why = []
    if not m.causal:
        why.append("runs causal states")
    if device != "cpu":
        return (*why, "runs on a CPU alone")
    if engine:
        why.append(f"the native engine {engine}")
    if m.ratio is not None and type(m.ratio) is not RowRatio:
        why.append(f"divides by sums that are positive, not by {m.ratio.name}")
    if dtype not in (torch.float32, torch.bfloat16):
        why.append(f"for float32 and bfloat16, here is {str(dtype).removeprefix('torch.')}")
    if "ratio" in m.feature.needs or m.feature.buffer_names:
        why.append(f"{m.feature.name} draws features or keeps their scale apart")
    if max(m.feature.size(dim), value_dim) > LARGEST:
        why.append(f"for features and values of at most {LARGEST} numbers")
    return tuple(why)


def advance(m: Recurrent, c: Context, carry: Carry | None, lse: bool) -> tuple[Tensor, Tensor | None, Carry]:
    """`(out (b, h, n, e), lse or None, the state after the last token)`; as many queries as keys."""
    q, k, v = c.q, c.k, c.v
    if type(m.feature) not in FUSED:
        q, k, v = (x.to(torch.float32) for x in (q, k, v))
        q, k = m.feature.map(q, "q", None, c.buffers)[0], m.feature.map(k, "k", c.valid, c.buffers)[0]
        places = c.j
        q, k = m.feature.place(q, places), m.feature.place(k, places)
    q, k, v = lined(q), lined(k), lined(v)
    work = Work.of(m, None if c.ends is None else c.ends.to(torch.int64).contiguous())
    given = (q, k, v, *c.params.values(), *c.streams.values(), *((carry.s, carry.z) if carry else ()))
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    log: Tensor | None
    if type(m.decay) is ChannelDecay and not tracked and _ready(c.streams["forget"], k.shape[1]):
        log, work = c.streams["forget"], replace(work, temperature=m.decay.temperature)
    else:
        log = None if m.decay is None else m.decay.log(c).to(torch.float32)
    gain = None if m.write is None else m.write.gain(c).to(torch.float32).unsqueeze(-1)
    b, g, n, size = k.shape
    if log is not None and log.shape[:3] != (b, g, n):
        log = log.expand(b, g, n, log.shape[3])
    if log is not None and log.shape[3] > 1 and log.stride(3) != 1:
        log = log.contiguous()
    if carry is None:
        carry = Carry.empty(b, g, size, v.shape[-1], torch.empty(0))
    s, z = carry.s.contiguous(), carry.z.contiguous()
    inputs = (q, k, v, log, gain, s, z)
    if tracked:
        out, total, s, z = Advance.apply(*inputs, work)
    else:
        out, total, s, z = forward(*inputs, work)
    return out.to(c.q.dtype), log_total(total) if lse else None, Carry(s, z, carry.m)


def _ready(x: Tensor, groups: int) -> bool:
    """Whether the engine reads a stream of decays as it is."""
    return x.shape[1] == groups and x.dtype == torch.float32


class NativeLinearKernel(Kernel):
    """A state in C++ on a CPU: decays of a head, a token or a channel, writes that add or overwrite, with gradients."""

    name = "native_linear"

    def efficiency(self, r: Request) -> float:
        return 0.8

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        s = r.shape
        why = list(refusals(m, r.device, r.dtype, s.head_dim, s.value_dim))
        if not isinstance(m, Recurrent):
            return why
        if r.masked:
            why.append("a state cannot follow a mask of single pairs; use key_lengths for padding")
        if r.lse and (m.ratio is None or not m.ratio.has_lse):
            why.append("has no row denominator, so no lse")
        if r.shifted and not r.decoding:
            why.append("a causal state needs as many queries as keys, or a state to go on from")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Recurrent)
        s, size = r.shape, m.feature.size(r.shape.head_dim)
        count = -(-s.length // CHUNK)
        wide, value = _padded(size), _padded(s.value_dim)
        flops = 2 * s.batch * products(m, s, wide, value, r.grad)
        q, k, v, o = r.tensor_bytes()
        readers, states = s.batch * s.heads, s.batch * s.kv_heads
        fused = type(m.feature) in FUSED
        mapped = 0 if fused else 4 * s.length * (readers * size + states * (size + s.value_dim))
        width = 0 if m.decay is None else size if m.decay.channels else 1
        as_given = type(m.decay) is ChannelDecay and not r.grad
        streams = 0 if as_given else 4 * states * s.length * (width + (m.write is not None))
        threads = min(torch.get_num_threads(), states)
        held = 4 * states * size * (s.value_dim + 1)
        peak = o + mapped + streams + 2 * held + threads * 4 * CHUNK * (8 * wide + 4 * value)
        if isinstance(m.ratio, RowRatio):
            peak += (1 + r.lse) * 4 * readers * s.length
        if r.grad:
            peak += q + k + v + mapped + 2 * streams
            peak += threads * 4 * wide * value * (count + 8)
        return Cost(flops, (q + k + v + o) * (3 if r.grad else 1), peak, 4)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Recurrent)
        out, lse, _ = advance(m, c, None, r.lse)
        return out, lse


def _padded(n: int) -> int:
    return -(-n // 16) * 16


def products(m: Recurrent, s: Shape, wide: int, value: int, grad: bool) -> int:
    """Multiply-adds of matrix products that the engine does a sample, padding included."""
    count, last = divmod(s.length, CHUNK)
    chunks = [(count, CHUNK)] * bool(count) + [(1, last)] * bool(last)
    if s.length == 1:
        turns = s.heads + s.kv_heads * (1 + _overwrites(m))
        total = turns * m.feature.size(s.head_dim) * value
    else:
        total = sum(times * _forward(m, n, wide, value, s) for times, n in chunks)
    return total + grad * sum(times * _backward(m, n, wide, value, s) for times, n in chunks)


def _overwrites(m: Recurrent) -> bool:
    return m.write is not None and m.write.overwrites


def _tiles(n: int, rows: int) -> list[tuple[int, int]]:
    """The first row and the end of each tile of so many rows."""
    return [(i, min(n, i + rows)) for i in range(0, n, rows)]


def _square(m: Recurrent, n: int, wide: int) -> int:
    """Products of a reader's rows and the keys of a chunk of n tokens."""
    if m.decay is not None and m.decay.channels:
        return wide * sum((stop - start) * start for start, stop in _tiles(n, EDGE))
    return wide * sum((stop - start) * _padded(stop) for start, stop in _tiles(n, ROWS))


def _solve(m: Recurrent, n: int, wide: int, value: int) -> int:
    """What finds the differences that a chunk writes."""
    if not _overwrites(m):
        return 0
    earlier = sum((stop - start) * start for start, stop in _tiles(n, EDGE))
    return _square(m, n, wide) + n * wide * value + earlier * value


def _forward(m: Recurrent, n: int, wide: int, value: int, s: Shape) -> int:
    turn, area = n * wide * value, sum((stop - start) * stop for start, stop in _tiles(n, ROWS))
    return s.kv_heads * (turn + _solve(m, n, wide, value)) + s.heads * (
        _square(m, n, wide) + area * value + turn
    )


def _backward(m: Recurrent, n: int, wide: int, value: int, s: Shape) -> int:
    turn, square = n * wide * value, _square(m, n, wide)
    tiles, blocks = _tiles(n, ROWS), _tiles(n, EDGE)
    area = sum((stop - start) * stop for start, stop in tiles)
    gathered = sum((stop - start) * (n - start) for start, stop in tiles)
    weighed = sum((stop - start) * _padded(stop) for start, stop in tiles) * value
    channels = m.decay is not None and m.decay.channels
    reader = weighed + 2 * turn + (2 * square if channels else wide * (area + gathered))
    total = s.kv_heads * (3 * turn + _solve(m, n, wide, value))
    total += s.heads * (square + gathered * value + reader)
    if _overwrites(m):
        later = sum((stop - start) * (n - stop) for start, stop in blocks)
        total += s.kv_heads * (square + later * value + reader)
    return total
