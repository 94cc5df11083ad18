"""What each family means: slow, whole, readable, in any float dtype up to float64.

Every kernel, decode step and distributed run answers to these functions. Inputs follow `saccade.attend`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from saccade.mechanism import ByHead, Combine, Join, Mechanism, Mix, Mixer, Pairwise, Recurrent
from saccade.mechanism.text import mechanism as parse
from saccade.parts.heads import LEARNED
from saccade.parts.memory import ChannelRatio, RowRatio, divide, log_total
from saccade.parts.normalizer import merge
from saccade.parts.pair import Context, Program, map_tokens, take_heads, without_padding
from saccade.parts.score import grouped_matmul
from saccade.parts.select import Select
from saccade.parts.selection import Buckets


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    params: dict[str, Tensor] | None = None,
    streams: dict[str, Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
) -> Tensor:
    """The output of a mechanism by its definition.

    Shapes as in `saccade.attend`: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E), answer (B, H, L, E) in the dtype
    of q, computed in float32 or wider. Holds whole (L, S) matrices: for tests and small inputs.
    """
    m = parse(mechanism)
    c = context(q, k, v, mask, key_lengths, params, streams, buffers)
    if key_lengths is not None and m.source("q") == LEARNED:
        c = replace(c, offset=None)  # learned queries are no tokens, so no padding is shared with them
    return evaluate(m, c)[0].to(q.dtype)


def context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    params: dict[str, Tensor] | None = None,
    streams: dict[str, Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
) -> Context:
    """A context with the queries at the end of the keys, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, keys = q.shape[2], k.shape[2]
    offset = keys - rows if key_lengths is None else 0 if rows == keys else None
    return Context(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        offset,
        0,
        key_lengths,
        mask,
        params or {},
        streams or {},
        buffers or {},
    )


def evaluate(m: Mechanism, c: Context) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)` of any family."""
    if isinstance(m, Pairwise | Recurrent):
        out, lse = pairwise(m, c) if isinstance(m, Pairwise) else recurrent(m, c)
        if m.output:
            c = replace(map_tokens(m.tokens, c, c.k.shape[2]), looks_back=m.causal)
        for part in m.output:
            out = part.map(out, c)
        return out, lse
    if isinstance(m, Mixer):
        return m.define(c), None
    assert isinstance(m, Combine)
    return combine(m, c)


def pairwise(m: Pairwise, c: Context) -> tuple[Tensor, Tensor | None]:
    """out_i = sum_j w_ij v_j, w the normalised logits of the pairs that exist."""
    if m.heads is not None and m.heads.learned_query:
        c = replace(c, q=c.q.expand(-1, -1, c.k.shape[2], -1), offset=0)
    program = Program.bind(m, map_tokens(m.tokens, c, c.k.shape[2]))
    rows, spans = slice(0, program.rows), [(0, program.keys)]
    for leaf in m.pairs.leaves():
        if isinstance(leaf, Select):
            chosen = program.selections[leaf]
            if isinstance(chosen, Buckets):
                return bucketed(program, chosen), None
    t = program.tile(rows, spans)
    if m.slots is None:
        w, lse = program.weights(t)
        return program.mix(w, t), lse
    logits, values = m.slots.rows(program.context)
    s = program.logits(t)
    w, lse = m.normalizer.normalize(torch.cat((s, logits.to(s.dtype).expand(*s.shape[:3], -1)), -1), t)
    w, own = w[..., : s.shape[-1]], w[..., s.shape[-1] :]
    for part in m.reweight:
        w = part.tile(w, t)
    out = program.mix(w, t)
    return out if values is None else out + (own.unsqueeze(-1) * values.to(own.dtype)).sum(-2), lse


def bucketed(program: Program, chosen: Buckets) -> Tensor:
    """Softmax attention inside each bucket; a query that several buckets took averages their outputs."""
    c = program.context
    limit = [p for p in program.pairs.leaves() if not isinstance(p, Select)]
    out = torch.zeros(
        (*program.q.shape[:3], program.v.shape[-1]), dtype=program.q.dtype, device=program.q.device
    )
    taken = torch.zeros_like(out[..., :1])
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            g = h * program.k.shape[1] // out.shape[1]
            for bucket in range(chosen.q.shape[2]):
                rows = chosen.q[b, h, bucket][chosen.q_valid[b, h, bucket]]
                cols = chosen.k[b, h, bucket][chosen.k_valid[b, h, bucket]]
                s = program.q[b, h, rows] @ program.k[b, g, cols].T
                i, j = c.i[b if c.offset is None else 0, rows][:, None], cols[None] + c.start
                for p in limit:
                    s = s.masked_fill(~p.exist(i, j), -math.inf)  # type: ignore[attr-defined]
                if c.mask is not None:
                    s = s.masked_fill(~c.mask.expand(*out.shape[:3], -1)[b, h][rows][:, cols], -math.inf)
                w, _ = program.mechanism.normalizer.normalize(s)
                out[b, h] = out[b, h].index_add(0, rows, w @ program.v[b, g, cols])
                taken[b, h] = taken[b, h].index_add(0, rows, torch.ones_like(taken[b, h, rows]))
    return out / taken.clamp_min(1)


def recurrent(m: Recurrent, c: Context) -> tuple[Tensor, Tensor | None]:
    """The parallel form: out_i = sum_j w_ij v_j with the weights below."""
    c = without_padding(map_tokens(m.tokens, c, c.k.shape[2]))
    w, lse = recurrent_weights(m, c)
    return grouped_matmul(w, c.v), lse


def recurrent_weights(m: Recurrent, c: Context) -> tuple[Tensor, Tensor | None]:
    """w_ij = phi(q_i).phi(k_j) decayed from j to i, divided as the ratio says, and the log-denominator or None."""
    phi_q, scale_q = m.feature.map(c.q, "q", None, c.buffers)
    phi_k, scale_k = m.feature.map(c.k, "k", c.valid, c.buffers)
    phi_q, phi_k = m.feature.place(phi_q, c.i), m.feature.place(phi_k, c.j)
    if c.valid is not None:
        phi_k = phi_k.masked_fill(~c.valid[:, None, :, None], 0)
    repeat = c.q.shape[1] // c.k.shape[1]
    i, j = c.i[:, None, :, None], c.j[:, None, None]
    exist = m.pairs.exist(i, j)  # type: ignore[attr-defined]
    if c.valid is not None:
        exist = exist & c.valid[:, None, None]
    if c.mask is not None:
        exist = exist & c.mask
    if m.write is not None and not m.write.overwrites:
        phi_k = phi_k * m.write.gain(c).unsqueeze(-1)
    decay = None if m.decay is None else m.decay.log(c).to(phi_q.dtype)
    if decay is not None and decay.shape[-1] > 1:
        log, dots = (
            torch.zeros((), dtype=phi_q.dtype, device=phi_q.device),
            _faded(phi_q, phi_k, decay, c.i - c.start),
        )
    else:
        log = torch.zeros((), dtype=phi_q.dtype, device=phi_q.device)
        if decay is not None:
            log = _fade(decay[..., 0], c.i - c.start, c.k.shape[2]).repeat_interleave(repeat, 1)
        dots = grouped_matmul(phi_q, phi_k.transpose(-1, -2))
    if scale_k is not None:
        log = log + scale_k.repeat_interleave(repeat, dim=1)[:, :, None]
    log = log.expand(*phi_q.shape[:3], phi_k.shape[2]).masked_fill(~exist, -math.inf)
    positive = m.ratio is not None and m.ratio.has_lse
    top = log.amax(-1, keepdim=True) if positive else torch.zeros_like(log[..., :1])
    top = top.masked_fill(torch.isneginf(top), 0.0)
    if isinstance(m.ratio, ChannelRatio):
        sums = phi_k.sum(2).repeat_interleave(repeat, dim=1)[:, :, None]
        dots = grouped_matmul(divide(phi_q, sums), phi_k.transpose(-1, -2))
    w = dots * torch.exp(log - top)
    if m.write is not None and m.write.overwrites:
        return w @ _rewritten(m, c, phi_k, decay).repeat_interleave(repeat, dim=1), None
    if not isinstance(m.ratio, RowRatio):
        return w, None
    total = w.sum(-1, keepdim=True)
    if not m.ratio.has_lse:
        return m.ratio.divide(w, total), None
    lse = (log_total(total) + top).squeeze(-1) + (0.0 if scale_q is None else scale_q)
    return divide(w, total), lse


def _fade(decay: Tensor, rows: Tensor, keys: int) -> Tensor:
    """Log decay from key j to row i, (b or 1, g, rows, keys), of log decays (b or 1, g, keys or 1); where j > i without meaning."""
    if decay.shape[2] == 1:
        return decay[..., None] * (rows[:, None, :, None] - torch.arange(keys, device=rows.device))
    cumulated = decay.cumsum(2)
    at = rows[:, None].expand(len(rows), decay.shape[1], -1)
    here = cumulated.expand(max(len(cumulated), len(rows)), -1, -1).gather(
        2, at.expand(max(len(cumulated), len(rows)), -1, -1)
    )
    return here[..., None] - cumulated[:, :, None]


def _faded(x: Tensor, y: Tensor, decay: Tensor, rows: Tensor) -> Tensor:
    """Products of x (b, h, rows, m) and y (b, g, keys, m), each channel decayed from key to row, those of later keys zero."""
    repeat, keys = x.shape[1] // y.shape[1], y.shape[2]
    later = torch.arange(keys, device=x.device) > rows[:, None, :, None]
    out = torch.zeros((*x.shape[:3], keys), dtype=x.dtype, device=x.device)
    for channel in range(x.shape[-1]):
        log = (
            _fade(decay[..., channel], rows, keys).masked_fill(later, -math.inf).repeat_interleave(repeat, 1)
        )
        part = y[..., channel].repeat_interleave(repeat, 1)
        out = out + x[..., channel, None] * part[:, :, None] * torch.exp(log)
    return out


def _rewritten(m: Recurrent, c: Context, phi_k: Tensor, decay: Tensor | None) -> Tensor:
    """What each value adds to what is written at each token, (b, g, tokens, tokens), where writing overwrites.

    u_t = beta_t (v_t - sum over s < t of (phi(k_t).phi(k_s), decayed from s to t) u_s).
    """
    assert m.write is not None
    keys = phi_k.shape[2]
    rows = torch.arange(keys, device=phi_k.device)[None]
    fixed = phi_k.new_zeros(1, phi_k.shape[1], 1, 1) if decay is None else decay
    beta = m.write.gain(c).to(phi_k.dtype)
    if fixed.shape[-1] > 1:
        seen = _faded(phi_k, phi_k, fixed, rows)
    else:
        later = torch.ones(keys, keys, dtype=torch.bool, device=phi_k.device).triu()
        seen = (phi_k @ phi_k.mT) * torch.exp(_fade(fixed[..., 0], rows, keys).masked_fill(later, -math.inf))
    lower = torch.eye(keys, dtype=phi_k.dtype, device=phi_k.device) + beta.unsqueeze(-1) * seen.tril(-1)
    return torch.linalg.solve_triangular(lower, torch.diag_embed(beta), upper=False)


def combine(m: Combine, c: Context) -> tuple[Tensor, Tensor | None]:
    """Mix adds outputs, Join merges by log-denominator, ByHead gives each member its share of the heads."""
    if isinstance(m, Mix):
        outs = [share * evaluate(child, c)[0] for child, share in zip(m.children, m.share(), strict=True)]
        return torch.stack(outs).sum(0), None
    if isinstance(m, Join):
        out, lse = merge([(o, s) for o, s in (evaluate(child, c) for child in m.children) if s is not None])
        return out, lse
    assert isinstance(m, ByHead)
    parts = [evaluate(child, share) for child, share in zip(m.children, by_head(m, c), strict=True)]
    return torch.cat([o for o, _ in parts], dim=1), None


def by_head(m: ByHead, c: Context) -> list[Context]:
    """The context of each member: its share of the query heads and of what belongs to them."""
    count = len(m.children)
    width = m.share(c.q.shape[1])
    groups = c.k.shape[1]
    if groups % count and groups != 1:
        raise ValueError(
            f"by_head: {count} members need 1 key-value head or a multiple of {count}, got {groups}"
        )

    return [
        take_heads(c, child.weights, range(n * width, (n + 1) * width)) for n, child in enumerate(m.children)
    ]
