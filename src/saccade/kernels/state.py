"""Recurrent mechanisms on a GPU in Triton: states that tokens add to or overwrite, forward and backward, from a state and to one."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels import delta_run, sparse_run, state_run
from saccade.kernels.base import Kernel
from saccade.kernels.recurrent import Carry
from saccade.kernels.state_run import Form
from saccade.mechanism.values import Mechanism, Recurrent
from saccade.parts.feature import Elu1, Identity
from saccade.parts.memory import RowRatio, log_total
from saccade.parts.pair import Context, without_padding

CHUNK = 64
LARGEST = 128


def chunked(
    m: Recurrent, c: Context, carry: Carry | None = None, final: bool = True
) -> tuple[Tensor, Tensor | None, Carry | None]:
    """`(out (b, h, L, e), lse or None, the state after the last token, where asked for)`; as many queries as keys."""
    wide = torch.promote_types(c.q.dtype, torch.float32)
    log = None if m.decay is None else m.decay.log(c).to(wide)
    first = None if carry is None else (carry.s, carry.z)
    gain = None if m.write is None else m.write.gain(c).to(wide)
    overwrites = m.write is not None and m.write.overwrites
    channels = m.decay is not None and m.decay.channels
    q, k, v, elu = c.q, c.k, c.v, type(m.feature) is Elu1 and gain is None and not channels
    if gain is not None or not (elu or type(m.feature) is Identity):
        c = without_padding(c)
        q, k = (m.feature.map(x.to(wide), side, None, c.buffers)[0] for x, side in ((c.q, "q"), (c.k, "k")))  # type: ignore[arg-type]
        places = c.j
        q, k = m.feature.place(q, places), m.feature.place(k, places)
        k = k if overwrites or gain is None else k * gain.unsqueeze(-1)
        q, k, v = q.to(c.q.dtype), k.to(c.q.dtype), c.v
    level = carry.m if carry is not None else q.new_full(k.shape[:2], -torch.inf, dtype=wide)
    if overwrites:
        assert gain is not None
        out, s = delta_run.attend(q, k, v, gain, log, first, c.ends, final)
        none = k.new_zeros(*k.shape[:2], k.shape[3], dtype=wide)
        return out, None, None if s is None else Carry(s, none, level)
    form = Form(isinstance(m.ratio, RowRatio), elu, final)
    out, total, last = state_run.attend(q, k, v, log, first, c.ends, form)
    return (
        out,
        None if total is None else log_total(total),
        None if last is None else Carry(*last, level),
    )


class StateKernel(Kernel):
    """A state in chunks of 64 tokens whose products stay on the chip; sequences in segments side by side."""

    name = "state"
    counted = False

    def efficiency(self, r: Request) -> float:
        if r.device == "cpu":
            return 1e-5
        return 0.4 if r.dtype.itemsize == 2 else 0.2

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Recurrent):
            return [f"runs recurrent mechanisms, this one is {m.family}"]
        why = []
        if r.device not in ("cpu", "cuda"):
            why.append("runs on CUDA")
        elif sparse_run.missing(r.device):
            why.append(sparse_run.missing(r.device))
        if r.dtype == torch.float64 and not (r.device == "cpu" and sparse_run.interpreted()):
            why.append("adds up in float32")
        if not m.causal:
            why.append("without an order a state is two matrix products; recurrent runs those")
        if r.masked:
            why.append("a state cannot follow a mask of single pairs; use key_lengths for padding")
        if m.ratio is not None and type(m.ratio) is not RowRatio:
            why.append(f"divides by sums that are positive, not by {m.ratio.name}")
        if r.lse and (m.ratio is None or not m.ratio.has_lse):
            why.append("has no row denominator, so no lse")
        if m.causal and r.shifted:
            why.append("a causal state needs as many queries as keys, or a state to go on from")
        if "ratio" in m.feature.needs:
            why.append(
                f"{m.feature.name} keeps a scale of its own for each token, which recurrent carries along"
            )
        size = max(m.feature.size(r.shape.head_dim), r.shape.value_dim)
        if size > LARGEST:
            why.append(f"features and values have at most {LARGEST} channels, here {size}")
        overwrites = m.write is not None and m.write.overwrites
        if overwrites and r.item < 4 and r.device == "cuda":
            why.append(
                "tokens that overwrite are solved in float32; half precision is not exact enough here yet"
            )
        if overwrites and m.decay is not None and m.decay.channels:
            why.append("tokens that overwrite meet one decay a token, not one a channel")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Recurrent)
        s, size = r.shape, m.feature.size(r.shape.head_dim)
        q, k, v, o = r.tensor_bytes()
        overwrites = m.write is not None and m.write.overwrites
        channels = m.decay is not None and m.decay.channels
        tokens = s.batch * s.length
        each = 2 * CHUNK * (size + s.value_dim) + 4 * size * s.value_dim
        flops = tokens * (s.heads * each + s.kv_heads * 2 * size * s.value_dim)
        if channels:
            flops += 14 * tokens * s.heads * CHUNK * size
        if overwrites:
            flops += tokens * s.kv_heads * (26 * CHUNK**2 + 2 * CHUNK * (2 * size + s.value_dim) + each)
        states = 4 * s.batch * s.heads * -(-s.length // state_run.LEAST) * size * s.value_dim
        kept = (q + k) * 2 if channels or overwrites else 0
        log = tokens * s.kv_heads * size * r.wide if channels else 0
        mapped = 0 if type(m.feature) in (Elu1, Identity) else 3 * (q + k)
        peak = o + states + kept + mapped + tokens * s.heads * (r.wide + CHUNK * r.item * channels)
        moved = q + k + v + o + k + v + 2 * kept + log
        if r.grad:
            wide = r.wide // r.item if s.heads != s.kv_heads else 1
            spread = s.heads // s.kv_heads * wide
            peak += 2 * states + q + 2 * spread * (k + v) + 3 * log + kept + o
        return Cost(flops * (4 if r.grad else 1), moved * (4 if r.grad else 1), peak, 24 if r.grad else 8)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Recurrent)
        out, lse, _ = chunked(m, c, final=False)
        return out.to(r.dtype), lse
