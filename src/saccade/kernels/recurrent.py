"""Recurrent mechanisms in chunks: dense inside a chunk, a carried state between chunks, and one step for decoding.

With S the state, z the sum of weights and M the running log-scale of both, every weight of key j seen from row i is
phi(q_i).phi(k_j) exp(log_i - log_j + m_j - M_i): `log` the cumulated decay, m_j the log-scale that the feature map
kept apart. Where there is a ratio, M cancels; without one it is 0.

Legend: b batch, g state heads, r query heads a state head, n chunks, C chunk length, m feature size, e value size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels import gated
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Recurrent
from saccade.parts.feature import Identity
from saccade.parts.memory import ChannelRatio, Ratio, RowRatio, divide, log_total
from saccade.parts.pair import Context, without_padding

CHUNK = 128


def chunk_length(m: Recurrent, device: str) -> int:
    """Tokens of a chunk: what a cache holds on a CPU, what fills a GPU; many small chunks where these are solved at once."""
    if by_group(m):
        return gated.CHUNK * gated.GROUP
    return CHUNK if device == "cpu" else 4 * CHUNK


@dataclass
class Carry:
    """The state between tokens: S (b, g, m, e), z (b, g, m) and M (b, g), float32 or wider."""

    s: Tensor
    z: Tensor
    m: Tensor

    @classmethod
    def empty(cls, b: int, g: int, m: int, e: int, like: Tensor) -> Carry:
        return cls(like.new_zeros(b, g, m, e), like.new_zeros(b, g, m), like.new_full((b, g), -torch.inf))


def bidirectional(m: Recurrent, c: Context) -> tuple[Tensor, Tensor | None]:
    """Every query reads the sum over all keys."""
    c = without_padding(c)
    q, k, v = (_wide(x) for x in (c.q, c.k, c.v))
    g, h = k.shape[1], q.shape[1]
    phi_q, scale_q = m.feature.map(q, "q", None, c.buffers)
    phi_k, scale_k = m.feature.map(k, "k", c.valid, c.buffers)
    phi_q, phi_k = m.feature.place(phi_q, c.i), m.feature.place(phi_k, c.j)
    if m.write is not None:
        phi_k = phi_k * m.write.gain(c).unsqueeze(-1)
    if c.valid is not None:
        phi_k = phi_k.masked_fill(~c.valid[:, None, :, None], 0)
    top = None
    if scale_k is not None:
        if c.valid is not None:
            scale_k = scale_k.masked_fill(~c.valid[:, None], -torch.inf)
        top = torch.nan_to_num(scale_k.amax(-1, keepdim=True), neginf=0.0)
        phi_k = phi_k * torch.exp(scale_k - top).unsqueeze(-1)
    s, z = phi_k.transpose(-1, -2) @ v, phi_k.sum(2)
    if isinstance(m.ratio, ChannelRatio):
        s = divide(s, z.unsqueeze(-1))
    rows = phi_q.reshape(q.shape[0], g, -1, phi_q.shape[-1])
    out = (rows @ s).view(*q.shape[:3], -1)
    if not isinstance(m.ratio, RowRatio):
        return out, None
    total = (rows @ z.unsqueeze(-1)).view(q.shape[:3])
    out = m.ratio.divide(out, total.unsqueeze(-1))
    if not m.ratio.has_lse:
        return out, None
    lse = log_total(total)
    if scale_q is not None:
        lse = lse + scale_q
    if top is not None:
        lse = lse + top.repeat_interleave(h // g, dim=1)
    return out, lse


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked(m: Recurrent, c: Context, carry: Carry | None = None) -> tuple[Tensor, Tensor | None, Carry]:
    """Causal: `(out (b, h, L, e), lse or None, the state after the last token)`; as many queries as keys."""
    c = without_padding(c)
    b, g, e = c.q.shape[0], c.k.shape[1], c.v.shape[-1]
    wide = torch.promote_types(c.v.dtype, torch.float32)
    decay = None if m.decay is None else m.decay.log(c).to(wide)
    gain = None if m.write is None else m.write.gain(c).to(wide)
    empty = torch.empty(0, dtype=wide, device=c.v.device)
    carry = carry or Carry.empty(b, g, m.feature.size(c.q.shape[-1]), e, empty)
    outs, lses = [], []
    inputs = (c.q, c.k, c.v, *c.params.values(), *c.streams.values(), carry.s)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    whole = None if tracked else c.q.new_empty(*c.q.shape[:3], e)
    chunk, places = chunk_length(m, c.q.device.type), c.j
    chunks = zip(*(x.split(chunk, dim=2) for x in (c.q, c.k, c.v)), strict=True)
    for n, (q, k, v) in enumerate(chunks):
        valid = None if c.valid is None else c.valid[:, n * chunk : (n + 1) * chunk]
        fq, scale_q = m.feature.map(_wide(q), "q", None, c.buffers)
        fk, scale_k = m.feature.map(_wide(k), "k", valid, c.buffers)
        at = slice(n * chunk, (n + 1) * chunk)
        fq, fk = (m.feature.place(x, places[:, at]) for x in (fq, fk))
        log = decay if decay is None or decay.shape[2] == 1 else decay[:, :, at]
        strength = None if gain is None else gain[:, :, at]
        if valid is not None:
            fk = fk.masked_fill(~valid[:, None, :, None], 0)
            scale_k = None if scale_k is None else scale_k.masked_fill(~valid[:, None], -torch.inf)
        out, lse, carry = advance(m, fq, fk, _wide(v), scale_k, log, strength, carry)
        if whole is None:
            outs.append(out.to(c.q.dtype))
        else:
            whole[:, :, n * chunk : n * chunk + out.shape[2]] = out
        lses.append(lse if lse is None or scale_q is None else lse + scale_q)
    return (
        torch.cat(outs, 2) if whole is None else whole,
        None if lses[0] is None else torch.cat([x for x in lses if x is not None], 2),
        carry,
    )


def by_group(m: Recurrent) -> bool:
    """Whether the chunks of `gated` run a mechanism: decay by channel, or writing that overwrites."""
    return (m.decay is not None and m.decay.channels) or (m.write is not None and m.write.overwrites)


def advance(
    m: Recurrent,
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    scale: Tensor | None,
    log: Tensor | None,
    gain: Tensor | None,
    carry: Carry,
) -> tuple[Tensor, Tensor | None, Carry]:
    """One chunk of C tokens: fq (b, h, C, m), fk (b, g, C, m), v (b, g, C, e), scale (b, g, C), log (b or 1, g, C or 1, 1 or m), gain (b, g, C)."""
    overwrites = m.write is not None and m.write.overwrites
    if gain is not None and not overwrites:
        fk = fk * gain.unsqueeze(-1)
    if not by_group(m):
        return _square(m.ratio, fq, fk, v, scale, None if log is None else log[..., 0], carry)
    z = carry.z if isinstance(m.ratio, RowRatio) else None
    out, total, s, z = gated.advance(fq, fk, v, log, gain if overwrites else None, carry.s, z)
    after = Carry(s, carry.z if z is None else z, carry.m)
    if total is None:
        return out, None, after
    assert isinstance(m.ratio, RowRatio)
    out = m.ratio.divide(out, total.unsqueeze(-1))
    return out, log_total(total) if m.ratio.has_lse else None, after


def _square(
    ratio: Ratio | None,
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    scale: Tensor | None,
    log: Tensor | None,
    carry: Carry,
) -> tuple[Tensor, Tensor | None, Carry]:
    """One chunk as one square of weights; log (b or 1, g, C or 1) decays every channel alike."""
    b, h, span, size = fq.shape
    g = fk.shape[1]
    rows = fq.reshape(b, g, h // g * span, size)
    a = (rows @ fk.transpose(-1, -2)).view(b, g, h // g, span, span)
    reader, writer, keep, level = rows, fk, None, None
    if log is None and scale is None:
        a = a.tril()
        final = carry.m
    else:
        log = v.new_zeros(1, g, 1) if log is None else log
        if log.shape[-1] == 1:
            steps = torch.arange(1, span + 1, device=v.device, dtype=v.dtype)
            sums = log * steps
            path = (log.unsqueeze(-1) * (steps[:, None] - steps)).masked_fill(
                ~gated.below(span, v.device), -torch.inf
            )
        else:
            sums, path = log.cumsum(-1), gated.paths(log)
        if scale is None:
            read, writes, keep, final = torch.exp(sums), path[..., -1, :], torch.exp(sums[..., -1]), carry.m
        else:
            path = path + scale.unsqueeze(-2)
            before = carry.m[..., None] + sums
            level = torch.maximum(path.amax(-1), before)
            safe, final = torch.nan_to_num(level, neginf=0.0), level[..., -1]
            path = path - safe.unsqueeze(-1)
            read, writes = torch.exp(before - safe), path[..., -1, :]
            keep = read[..., -1]
        a = a * torch.exp(path).unsqueeze(-3)
        reader = rows * read.expand(b, g, span).repeat(1, 1, h // g).unsqueeze(-1)
        writer = fk * torch.exp(writes).unsqueeze(-1)
    square = a.view(b, g, -1, span)
    out = square @ v + reader @ carry.s
    s, z = writer.transpose(-1, -2) @ v, carry.z
    if ratio is not None:
        z = (z if keep is None else z * keep[..., None]) + writer.sum(2)
    after = Carry((carry.s if keep is None else carry.s * keep[..., None, None]) + s, z, final)
    if not isinstance(ratio, RowRatio):
        return out.view(b, h, span, -1), None, after
    total = square.sum(-1) + (reader @ carry.z.unsqueeze(-1)).squeeze(-1)
    out = ratio.divide(out, total.unsqueeze(-1))
    if not ratio.has_lse:
        return out.view(b, h, span, -1), None, after
    lse = log_total(total).view(b, g, h // g, span)
    lse = lse if level is None else lse + level.unsqueeze(2)
    return out.view(b, h, span, -1), lse.view(b, h, span), after


def step(m: Recurrent, c: Context, carry: Carry) -> tuple[Tensor, Carry]:
    """One token: read after writing. q (b, h, 1, d), k and v (b, g, 1, .)."""
    q, k, v = (_wide(x) for x in (c.q, c.k, c.v))
    b, h = q.shape[:2]
    g, e = k.shape[1], v.shape[-1]
    phi_q, _ = m.feature.map(q, "q", None, c.buffers)
    phi_k, scale = m.feature.map(k, "k", None, c.buffers)
    places = c.j
    phi_q, phi_k = m.feature.place(phi_q, places), m.feature.place(phi_k, places)
    log = v.new_zeros(1, g, 1) if m.decay is None else m.decay.log(c)[:, :, 0].to(v.dtype)
    gain = None if m.write is None else m.write.gain(c)[:, :, 0].to(v.dtype)
    fk, value, level = phi_k[:, :, 0], v[:, :, 0], carry.m
    if scale is None:
        keep = torch.exp(log)
    else:
        before = carry.m + log[..., 0]
        level = torch.maximum(before, scale[..., 0])
        keep = torch.exp(before - level).unsqueeze(-1)
        fk = fk * torch.exp(scale[..., 0] - level).unsqueeze(-1)
    s = carry.s * keep.unsqueeze(-1)
    if m.write is not None and m.write.overwrites:
        assert gain is not None
        value = (value - (fk.unsqueeze(-2) @ s).squeeze(-2)) * gain.unsqueeze(-1)
    elif gain is not None:
        fk = fk * gain.unsqueeze(-1)
    s = s + fk.unsqueeze(-1) * value.unsqueeze(-2)
    z = carry.z if m.ratio is None else carry.z * keep + fk
    rows = phi_q.view(b, g, h // g, -1)
    out = rows @ s
    if isinstance(m.ratio, RowRatio):
        total = rows @ z.unsqueeze(-1)
        out = m.ratio.divide(out, total)
    return out.view(b, h, 1, e), Carry(s, z, level)


class RecurrentKernel(Kernel):
    """A state in chunks of 128 tokens; linear in length, any device, with gradients."""

    name = "recurrent"

    def efficiency(self, r: Request) -> float:
        return 0.5 if r.device == "cpu" else 0.1

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Recurrent):
            return [f"runs recurrent mechanisms, this one is {m.family}"]
        why = []
        if r.masked:
            why.append("a state cannot follow a mask of single pairs; use key_lengths for padding")
        if r.lse and (m.ratio is None or not m.ratio.has_lse):
            why.append("has no row denominator, so no lse")
        if m.causal and r.shifted and not r.decoding:
            why.append("a causal state needs as many queries as keys, or a state to go on from")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Recurrent)
        s = r.shape
        size = m.feature.size(s.head_dim)
        q, k, v, o = r.tensor_bytes()
        draws = m.feature.flops(s.head_dim)
        wide = r.wide // r.item
        phi_q, phi_k = (s.batch * x * size * r.wide for x in (s.heads * s.length, s.kv_heads * s.keys))
        drawn = bool(m.feature.buffer_names)
        mapped = 0 if isinstance(m.feature, Identity) else phi_q + phi_k
        if not m.causal:
            flops = s.batch * (
                s.heads * s.length * (draws + 2 * size * s.value_dim)
                + s.kv_heads * s.keys * (draws + 2 * size * s.value_dim)
            )
            if isinstance(m.ratio, RowRatio):
                flops += 2 * s.batch * s.heads * s.length * size
            if r.grad:
                flops = 3 * flops - s.batch * (s.heads * s.length + s.kv_heads * s.keys) * draws
            widened = 0 if wide == 1 else (q + k + v) * wide
            peak = widened + mapped + (3 if isinstance(m.ratio, RowRatio) else 1) * o * wide
            if r.grad:
                peak += (q + k + v + o) * wide + (2 * mapped if drawn else 0)
            return Cost(flops, q + k + v + o + 2 * (phi_q + phi_k), peak, 20)
        if by_group(m):
            return self._group_cost(m, r)
        span = chunk_length(m, r.device)
        count, last = divmod(s.length, span)
        ends = (min(s.length, span), last or min(s.length, span))
        squares = count * span**2 + last**2
        inner = s.batch * s.heads * 2 * (squares * (size + s.value_dim) + s.length * size * s.value_dim)
        if isinstance(m.ratio, RowRatio):
            inner += 2 * s.batch * s.heads * s.length * size
        flops = inner + s.batch * s.kv_heads * s.length * 2 * size * s.value_dim
        if r.grad:  # neither the empty state before the first chunk nor the last one, unread, has a gradient
            first = s.heads * ends[0] * (s.value_dim + isinstance(m.ratio, RowRatio))
            flops = 3 * flops - 2 * s.batch * size * (first + 2 * s.kv_heads * ends[1] * s.value_dim)
        flops += s.batch * (s.heads + s.kv_heads) * s.length * draws * (2 if r.grad else 1)
        states = s.batch * s.kv_heads * (count if r.grad else 2) * size * s.value_dim * r.wide
        weighed = drawn or m.decay is not None
        chunk = (5 if drawn else 4 if weighed else 2) * span + 4 * size + 2 * s.value_dim
        peak = states + o + s.batch * s.heads * ends[0] * chunk * r.wide
        if r.grad:
            peak = states + 2 * o * wide + (q + k + v) * wide // 2 + mapped * (3 if drawn else 1)
            peak += s.batch * s.heads * squares * r.wide * (2 if weighed else 1)
            peak += phi_q + phi_k if weighed else 0
        return Cost(flops, 3 * (q + k + v + o) * (3 if r.grad else 1), peak, 40 + 12 * count)

    def _group_cost(self, m: Recurrent, r: Request) -> Cost:
        """The cost of chunks that run in groups."""
        s, size, span = r.shape, m.feature.size(r.shape.head_dim), gated.CHUNK
        chunks = -(-s.length // span)
        readers, states = s.batch * s.heads, s.batch * s.kv_heads
        channels = m.decay is not None and m.decay.channels
        products = 2 * size * (gated.far_pairs(span) if channels else span**2)
        turn, ratio = 2 * span * size * s.value_dim, isinstance(m.ratio, RowRatio)
        flops = chunks * readers * (products + 2 * span**2 * s.value_dim + turn + ratio * 2 * span * size)
        flops += chunks * states * turn
        overwrites = m.write is not None and m.write.overwrites
        if overwrites:
            flops += chunks * states * (products + turn)
        if r.grad:  # the state after the last chunk is not read, the one before the first has no gradient
            flops = 3 * flops - states * turn * (2 + overwrites)
            flops += overwrites * chunks * states * 2 * span**2 * (size + s.value_dim)
        q, k, v, o = r.tensor_bytes()
        wide, held = r.wide // r.item, min(chunks, gated.GROUP)
        near, carried = gated.BLOCK * size * channels, states * size * s.value_dim
        row = 3 * size + s.value_dim + 2 * span + (near or 2 * span)
        each = readers * row + states * (2 * size + s.value_dim + 2 * overwrites * row)
        peak = o + held * r.wide * (span * each + carried)
        if r.grad:
            solved = overwrites * (3 * span + 2 * size + s.value_dim)
            each = readers * (span + 3 * size + 2 * near) + states * (2 * size + s.value_dim + solved)
            peak = 2 * o * wide + chunks * r.wide * (span * each + carried)
        return Cost(flops, 4 * (q + k + v + o) * (3 if r.grad else 1), peak, 60 + 8 * chunks)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Recurrent)
        out, lse = chunked(m, c)[:2] if m.causal else bidirectional(m, c)
        return out.to(r.dtype), lse
