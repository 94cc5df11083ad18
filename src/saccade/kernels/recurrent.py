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
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Recurrent
from saccade.parts.memory import ChannelRatio, RowRatio
from saccade.parts.pair import Context, without_padding

CHUNK = 128


@dataclass
class Carry:
    """The state between tokens: S (b, g, m, e), z (b, g, m) and M (b, g), float32 or wider."""

    s: Tensor
    z: Tensor
    m: Tensor

    @classmethod
    def empty(cls, b: int, g: int, m: int, e: int, like: Tensor) -> Carry:
        return cls(like.new_zeros(b, g, m, e), like.new_zeros(b, g, m), like.new_full((b, g), -torch.inf))


def bidirectional(m: Recurrent, c: Context, chunk: int = CHUNK) -> tuple[Tensor, Tensor | None]:
    """Every query reads the sum over all keys."""
    c = without_padding(c)
    q, k, v = (_wide(x) for x in (c.q, c.k, c.v))
    g, h = k.shape[1], q.shape[1]
    phi_q, scale_q = m.feature.map(q, "q", None, c.buffers)
    phi_k, scale_k = m.feature.map(k, "k", c.valid, c.buffers)
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
        s = torch.where(z.unsqueeze(-1) > 0, s / _positive(z).unsqueeze(-1), 0.0)
    rows = phi_q.reshape(q.shape[0], g, -1, phi_q.shape[-1])
    out = (rows @ s).view(*q.shape[:3], -1)
    if not isinstance(m.ratio, RowRatio):
        return out, None
    total = (rows @ z.unsqueeze(-1)).view(q.shape[:3])
    lse = total.log()
    if scale_q is not None:
        lse = lse + scale_q
    if top is not None:
        lse = lse + top.repeat_interleave(h // g, dim=1)
    return torch.where(total.unsqueeze(-1) > 0, out / _positive(total).unsqueeze(-1), 0.0), lse


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def chunked(
    m: Recurrent, c: Context, carry: Carry | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor | None, Carry]:
    """Causal: `(out (b, h, L, e), lse or None, the state after the last token)`; as many queries as keys."""
    c = without_padding(c)
    q, k, v = (_wide(x) for x in (c.q, c.k, c.v))
    b, h, length, _ = q.shape
    g, e = k.shape[1], v.shape[-1]
    r = h // g
    phi_q, scale_q = m.feature.map(q, "q", None, c.buffers)
    phi_k, scale_k = m.feature.map(k, "k", c.valid, c.buffers)
    if c.valid is not None:
        phi_k = phi_k.masked_fill(~c.valid[:, None, :, None], 0)
        scale_k = None if scale_k is None else scale_k.masked_fill(~c.valid[:, None], -torch.inf)
    size = phi_k.shape[-1]
    if carry is None:
        carry = Carry.empty(b, g, size, e, v)
    span = min(chunk, max(1, length))
    short = -length % span
    count = (length + short) // span
    fq = pad(phi_q, (0, 0, 0, short)).view(b, g, r, count, span, size).transpose(2, 3)
    fk = pad(phi_k, (0, 0, 0, short)).view(b, g, count, span, size)
    vc = pad(v, (0, 0, 0, short)).view(b, g, count, span, e)
    a = fq @ fk.unsqueeze(3).transpose(-1, -2)
    below = torch.ones(span, span, dtype=torch.bool, device=q.device).tril()
    rate = v.new_zeros(g) if m.decay is None else m.decay.log(g, q.device, v.dtype)
    tokens = torch.arange(1, count * span + 1, device=q.device).clamp_max(length).view(count, span)
    age = tokens - torch.arange(0, count * span, span, device=q.device)[:, None]
    log = rate[:, None, None] * age
    fades = log[..., -1]
    if scale_k is None:
        top = None
        inside = torch.exp((log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill(~below, -torch.inf)).unsqueeze(
            2
        )
        write = torch.exp(fades.unsqueeze(-1) - log).unsqueeze(-1)
        read = torch.exp(log)[:, :, None, :, None]
        factors, final = torch.exp(fades).expand(b, g, count), carry.m
    else:
        shifted = pad(scale_k, (0, short), value=-torch.inf).view(b, g, count, span) - log
        within = shifted.cummax(-1).values
        starts = _running_max(carry.m, within[..., -1] + fades, fades)
        before = starts[..., :-1]
        level = torch.maximum(within, before.unsqueeze(-1))
        safe = torch.nan_to_num(level, neginf=0.0)
        inside = torch.exp(
            (shifted.unsqueeze(-2) - safe.unsqueeze(-1)).masked_fill(~below, -torch.inf)
        ).unsqueeze(3)
        base = torch.nan_to_num(starts[..., 1:], neginf=0.0)
        write = torch.exp(shifted + (fades - base).unsqueeze(-1)).unsqueeze(-1)
        read = torch.exp(before.unsqueeze(-1) - safe).unsqueeze(3).unsqueeze(-1)
        factors, final = torch.exp(before + fades - base), starts[..., -1]
        top = level + log
    if m.decay is None and scale_k is None:
        a, reader, writer = a.masked_fill(~below, 0), fq, fk
    else:
        a, reader, writer = a * inside, fq * read, fk * write
    adds, sums = writer.transpose(-1, -2) @ vc, writer.sum(3)
    states, norms = [carry.s], [carry.z]
    for n in range(count):
        factor = factors[..., n]
        states.append(states[-1] * factor[..., None, None] + adds[:, :, n])
        norms.append(norms[-1] * factor[..., None] + sums[:, :, n])
    s, z = torch.stack(states[:-1], 2), torch.stack(norms[:-1], 2)

    out = a @ vc.unsqueeze(3) + reader @ s.unsqueeze(3)
    lse = None
    if isinstance(m.ratio, RowRatio):
        total = a.sum(-1) + (reader @ z[:, :, :, None, :, None]).squeeze(-1)
        out = torch.where(total.unsqueeze(-1) > 0, out / _positive(total).unsqueeze(-1), 0.0)
        lse = total.log() if top is None else total.log() + top.unsqueeze(3)
        lse = _rows(lse.unsqueeze(-1), length).squeeze(-1)
        if scale_q is not None:
            lse = lse + scale_q
    return _rows(out, length), lse, Carry(states[-1], norms[-1], final)


def _rows(x: Tensor, length: int) -> Tensor:
    """(b, g, n, r, C, e) to (b, h, L, e)."""
    b, g, count, r, span, e = x.shape
    return x.transpose(2, 3).reshape(b, g * r, count * span, e)[:, :, :length]


def _running_max(first: Tensor, ends: Tensor, fades: Tensor) -> Tensor:
    """Log-scale before every chunk and after the last, (b, g, n + 1): M' = max(M + fade, end)."""
    levels = [first]
    for n in range(ends.shape[-1]):
        levels.append(torch.maximum(levels[-1] + fades[..., n], ends[..., n]))
    return torch.stack(levels, -1)


def step(m: Recurrent, c: Context, carry: Carry) -> tuple[Tensor, Carry]:
    """One token: read after writing. q (b, h, 1, d), k and v (b, g, 1, .)."""
    q, k, v = (_wide(x) for x in (c.q, c.k, c.v))
    b, h = q.shape[:2]
    g, e = k.shape[1], v.shape[-1]
    phi_q, _ = m.feature.map(q, "q", None, c.buffers)
    phi_k, scale = m.feature.map(k, "k", None, c.buffers)
    rate = m.decay.log(g, q.device, v.dtype) if m.decay is not None else v.new_zeros(g)
    fk, level = phi_k[:, :, 0], carry.m
    if scale is None:
        keep = torch.exp(rate)[None].expand(b, g)
    else:
        level = torch.maximum(carry.m + rate, scale[..., 0])
        keep = torch.exp(carry.m + rate - level)
        fk = fk * torch.exp(scale[..., 0] - level).unsqueeze(-1)
    s = carry.s * keep[..., None, None] + fk.unsqueeze(-1) * v[:, :, 0].unsqueeze(-2)
    z = carry.z * keep[..., None] + fk
    rows = phi_q.view(b, g, h // g, -1)
    out = rows @ s
    if isinstance(m.ratio, RowRatio):
        total = rows @ z.unsqueeze(-1)
        out = torch.where(total > 0, out / _positive(total), 0.0)
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
        if r.lse and not isinstance(m.ratio, RowRatio):
            why.append("has no row denominator, so no lse")
        if m.causal and r.shifted and not r.decoding:
            why.append("a causal state needs as many queries as keys, or a state to go on from")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Recurrent)
        s = r.shape
        size = m.feature.size(s.head_dim)
        q, k, v, o = r.tensor_bytes()
        draws = 2 * s.head_dim * size if m.feature.buffer_names else 0
        wide = r.wide // r.item
        phi_q, phi_k = (s.batch * x * size * r.wide for x in (s.heads * s.length, s.kv_heads * s.keys))
        if not m.causal:
            flops = s.batch * (
                s.heads * s.length * (draws + 2 * size * s.value_dim)
                + s.kv_heads * s.keys * (draws + 2 * size * s.value_dim)
            )
            if isinstance(m.ratio, RowRatio):
                flops += 2 * s.batch * s.heads * s.length * size
            peak = 2 * (phi_q + phi_k) + 2 * o * wide
            return Cost(
                flops * (3 if r.grad else 1),
                q + k + v + o + 2 * (phi_q + phi_k),
                peak * (2 if r.grad else 1),
                20,
            )
        span = min(CHUNK, max(1, s.length))
        count = -(-s.length // span)
        tokens = count * span
        inner = s.batch * s.heads * tokens * (2 * span * (size + s.value_dim) + 2 * size * s.value_dim)
        if isinstance(m.ratio, RowRatio):
            inner += 2 * s.batch * s.heads * tokens * size
        flops = (
            inner
            + s.batch * s.kv_heads * tokens * 2 * size * s.value_dim
            + draws * s.batch * (s.heads + s.kv_heads) * s.length
        )
        square = s.batch * s.heads * tokens * span * r.wide
        states = s.batch * s.kv_heads * count * size * s.value_dim * r.wide
        peak = 2 * square + 3 * states + 2 * phi_q + phi_k + 2 * o * wide
        return Cost(
            flops * (3 if r.grad else 1),
            (q + k + v + o) + 2 * square + 2 * states,
            peak * (2 if r.grad else 1),
            40 + 4 * count,
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Recurrent)
        out, lse = chunked(m, c)[:2] if m.causal else bidirectional(m, c)
        return out.to(r.dtype), lse
