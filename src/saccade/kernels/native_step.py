"""One token on a recurrent state in the native engine: a call bound once to a mechanism and its sizes, then only addresses change.

What makes a token's decay, gain, unit vectors and normed output goes into the same call, for the parts listed here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade import native
from saccade.kernels import native_linear
from saccade.kernels.native_linear import FUSED, LEAST, Work, refusals
from saccade.mechanism.values import Recurrent
from saccade.native import Array, Linear
from saccade.parts.base import Sizes
from saccade.parts.decay import ChannelDecay, Decay, FixedDecay, GateDecay, StepDecay
from saccade.parts.output import OutNorm
from saccade.parts.pair import Context
from saccade.parts.state import State
from saccade.parts.tokens import Unit
from saccade.parts.write import Delta, StepWrite, Write


@dataclass(frozen=True)
class Bound:
    """A call without its addresses; `logs` are those of a fixed decay, `log` and `gain` the streams that rules read."""

    call: bytes
    names: tuple[str, ...]
    log: str | None
    gain: str | None
    logs: Tensor | None
    ratio: bool


def _decay(call: Linear, decay: Decay | None, groups: int) -> tuple[str | None, Tensor | None] | None:
    """The stream of a decay or its logarithms; None where it has no rule here."""
    if decay is None:
        return None, None
    if type(decay) is FixedDecay:
        bare = torch.empty(1, groups, 1, 1)
        logs = decay.log(Context(bare, bare, bare)).contiguous()
        call.log = Array(logs.data_ptr(), 0, 1, 0)
        return None, logs
    if isinstance(decay, GateDecay | ChannelDecay):
        call.decay_rule, call.temperature = 1, decay.temperature
        return "forget", None
    if type(decay) is StepDecay:
        call.decay_rule = 2
        return "step", None
    return None


def _gain(call: Linear, write: Write | None) -> tuple[str | None] | None:
    """The stream of a gain; None where it has no rule here."""
    if write is None:
        return (None,)
    if type(write) is StepWrite:
        call.gain_rule = 1
        return ("step",)
    if type(write) is Delta:
        call.gain_rule, call.most = 2, write.most
        return ("beta",)
    return None


@functools.lru_cache(maxsize=1024)
def bound(
    engine: str,
    m: Recurrent,
    q: torch.Size,
    groups: int,
    value: int,
    dtype: torch.dtype,
    isa: int,
    threads: int,
) -> Bound | None:
    """The call of one token for q (b, h, 1, d), or None where the parts have no rules here."""
    (b, h, _, d), e = q, value
    if engine or refusals(m, "cpu", dtype, d, e) or type(m.feature) not in FUSED:
        return None
    if any(type(t) is not Unit for t in m.tokens) or len(m.tokens) > 1:
        return None
    if any(type(o) is not OutNorm for o in m.output) or len(m.output) > 1:
        return None
    work = Work.of(m)
    call = Linear(
        bf16=dtype == torch.bfloat16,
        batch=b,
        heads=h,
        kv_heads=groups,
        rows=1,
        dim=d,
        value_dim=e,
        least=LEAST,
        elu=work.elu,
        channels=work.channels,
        overwrites=work.overwrites,
        isa=isa,
        threads=threads,
        pool=native.pool(),
    )
    call.q, call.k = Array(None, h * d, d, d), Array(None, groups * d, d, d)
    call.v, call.out = Array(None, groups * e, e, e), Array(None, h * e, e, e)
    for part in m.tokens:
        assert isinstance(part, Unit)
        call.unit_eps = part.eps
    for output in m.output:
        assert isinstance(output, OutNorm)
        call.norm_eps = output.eps
    log, gain = _decay(call, m.decay, groups), _gain(call, m.write)
    if log is None or gain is None:
        return None
    streams = m.streams(Sizes(h, groups, d, e))
    for name, field in ((log[0], "log"), (gain[0], "gain")):
        if name is not None:
            _, heads, *width = (*streams[name].shape(b, h, 1), 1)[:4]
            size = width[1] if streams[name].width is not None else 1
            setattr(call, field, Array(None, heads * size, size, 0))
            setattr(call, f"{field}_heads", heads)
    names = tuple(m.weights(Sizes(h, groups, d, e)))
    return Bound(bytes(call), names, log[0], gain[0], log[1], work.ratio)


def step(m: Recurrent, c: Context, state: State) -> tuple[Tensor, State] | None:
    """`(out (b, h, 1, e), the state after)` with token maps and outputs done; None where the general way must be gone."""
    q, k, v = c.q, c.k, c.v
    tensors = state.tensors
    s, z = tensors["s"], tensors["z"]
    given = (q, k, v, s, z, *c.params.values(), *c.streams.values())
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None
    plan = bound(
        native.reason(),
        m,
        q.shape,
        k.shape[1],
        v.shape[-1],
        q.dtype,
        native_linear.BEST,
        torch.get_num_threads(),
    )
    if plan is None or not all(x.is_contiguous() for x in given):
        return None
    if any(x.dtype != torch.float32 for x in given[3:]):
        return None
    call = Linear.from_buffer_copy(plan.call)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    s_after, z_after = torch.empty_like(s), torch.empty_like(z)
    call.q.data, call.k.data, call.v.data = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.out.data, call.s, call.z = out.data_ptr(), s.data_ptr(), z.data_ptr()
    call.s_after, call.z_after = s_after.data_ptr(), z_after.data_ptr()
    if plan.log is not None:
        call.log.data = c.streams[plan.log].data_ptr()
    if plan.gain is not None:
        call.gain.data = c.streams[plan.gain].data_ptr()
    if "rate" in plan.names:
        call.rate = c.params["rate"].data_ptr()
    if "out_norm" in plan.names:
        call.norm = c.params["out_norm"].data_ptr()
    if plan.ratio:
        total = z.new_empty(q.shape[:2])
        call.total = total.data_ptr()
    native.run_bound(call)
    return out, State({"s": s_after, "z": z_after, "m": tensors["m"]}, state.length + 1)
