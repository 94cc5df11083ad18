"""Calls that go on from a state: caches, recurrent states and prefix scans, one token or many at a time."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.kernels import native_linear, native_step
from saccade.kernels import state as on_gpu
from saccade.kernels.recurrent import Carry, chunked, step
from saccade.kernels.scan import logits_and_values, prefixes
from saccade.mechanism import ByHead, Combine, Mechanism, Mixer, Pairwise, Recurrent
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes
from saccade.parts.memory import RowRatio
from saccade.parts.pair import Context, Program, map_tokens, tail_name
from saccade.parts.state import State
from saccade.parts.tokens import On, TokenMap
from saccade.plan.choose import combine, finish, make
from saccade.plan.coded import advance_codes, init_codes, keeps_codes
from saccade.plan.lives import advance_lives, init_lives, window_of
from saccade.plan.place import empty_answer, request, zeros
from saccade.reference import by_head


def init_state(
    mechanism: str | Mechanism,
    batch: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> State:
    """The state before the first token. Raises NotSupported for a mechanism that cannot decode step by step."""
    m = parse(mechanism)
    e, h = value_dim or head_dim, heads or kv_heads
    if not m.causal:
        raise NotSupported(f"{m} reads later keys, so it cannot go on token by token; use {_relative(m)}")
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(m, ByHead):
        count = len(m.children)
        g = kv_heads // count if kv_heads % count == 0 else kv_heads
        return State(
            members=tuple(
                init_state(c, batch, g, head_dim, e, heads=m.share(h), dtype=dtype, device=device)
                for c in m.children
            )
        )
    if isinstance(m, Combine):
        return State(
            members=tuple(
                init_state(c, batch, kv_heads, head_dim, e, heads=h, dtype=dtype, device=device)
                for c in m.children
            )
        )
    sizes: dict[On, tuple[int, int]] = {"q": (h, head_dim), "k": (kv_heads, head_dim), "v": (kv_heads, e)}
    tails = {
        tail_name(part, on): torch.zeros(
            batch, sizes[on][0], part.past, sizes[on][1], dtype=dtype, device=device
        )
        for part, on in _looking_back(m)
    }
    if isinstance(m, Recurrent):
        carry = Carry.empty(
            batch, kv_heads, m.feature.size(head_dim), e, torch.empty(0, dtype=wide, device=device)
        )
        return State({"s": carry.s, "z": carry.z, "m": carry.m} | tails)
    if isinstance(m, Mixer):
        return m.fresh(batch, sizes, dtype, device)
    assert isinstance(m, Pairwise)
    if keeps_codes(m):
        return init_codes(m, batch, sizes, dtype, device, tails)
    if m.heads is not None and m.heads.learned_query:
        return State(
            {
                "out": torch.zeros(batch, h, e, dtype=wide, device=device),
                "lse": torch.full((batch, h), -torch.inf, dtype=wide, device=device),
            }
            | tails
        )
    kept = {n: x for n, x in sizes.items() if n != "q" or m.halo[0]}
    state = State({n: _no_rows(batch, x, dtype, device) for n, x in kept.items()} | tails)
    return state if window_of(m) is None else init_lives(m, state, h)


def _no_rows(batch: int, size: tuple[int, int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    return torch.empty(batch, size[0], 0, size[1], dtype=dtype, device=device)


def _looking_back(m: Mechanism) -> list[tuple[TokenMap, On]]:
    """The token maps that look at tokens before their own, and on what; a state keeps those rows."""
    return [(p, on) for p in m.parts() if isinstance(p, TokenMap) and p.past for on in p.on]


def _mapped(m: Pairwise | Recurrent, c: Context, state: State) -> Context:
    """New tokens after the token maps, which look back into the state."""
    if not m.tokens:
        return replace(c, offset=state.length, start=state.length)
    tails = {n: state.tensors[n] for n in (tail_name(part, on) for part, on in _looking_back(m))}
    c = map_tokens(m.tokens, replace(c, offset=state.length, start=state.length, tails=tails), c.k.shape[2])
    return replace(c, tails={n: x.clone() for n, x in c.tails.items()})


def _relative(m: Mechanism) -> str:
    never = [m.relative] if isinstance(m, Mixer) else [p.relative for p in m.parts() if p.causal == "never"]
    return never[0] if never else f"'causal + {m}'"


def advance(
    m: Mechanism, c: Context, state: State | None, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    """A call that goes on from a state and returns the next one."""
    if c.ends is not None:
        raise NotSupported("a state belongs to samples of one length: give key_lengths or a state, not both")
    if state is None:
        sizes: Sizes = c.sizes
        state = init_state(
            m,
            c.q.shape[0],
            sizes.kv_heads,
            sizes.head_dim,
            sizes.value_dim,
            heads=sizes.heads,
            dtype=c.q.dtype,
            device=c.q.device,
        )
    else:
        _check_state(m, c, state)
    if isinstance(m, Combine):
        shares = by_head(m, c) if isinstance(m, ByHead) else [c] * len(m.children)
        inner = lse or m.word == "join"
        found = [
            advance(child, share, s, inner, kernel)
            for child, share, s in zip(m.children, shares, state.members, strict=True)
        ]
        out, joint = combine(m, [(o, x) for o, x, _ in found])
        return out, joint, State({}, state.length + c.k.shape[2], 0, tuple(s for _, _, s in found))
    if isinstance(m, Mixer):
        return _advance_mixer(m, c, state, lse, kernel)
    assert isinstance(m, Pairwise | Recurrent)
    if isinstance(m, Pairwise) and window_of(m) is not None:
        return advance_lives(m, c, state, lse, kernel)
    if isinstance(m, Pairwise) and keeps_codes(m):
        return advance_codes(m, _mapped(m, c, state), state, lse, kernel)
    if isinstance(m, Pairwise) and not m.learned_query:
        return _advance_cache(m, c, state, lse, kernel)
    own = ("recurrent", "native_linear") if isinstance(m, Recurrent) else ("scan",)
    if kernel is not None and kernel not in own:
        raise NotSupported(
            f"with a state, {m} is run by {' or '.join(own)}, but the call demands {kernel}; leave it out"
        )
    if c.mask is not None:
        raise NotSupported(
            f"the state of {m} cannot follow a mask of single pairs; use key_lengths for padding"
        )
    if not c.k.shape[2]:
        return *zeros(m, c, lse), state
    if isinstance(m, Recurrent):
        return _advance_recurrent(m, c, state, lse, kernel)
    return _advance_scan(m, c, state)


def _check_state(m: Mechanism, c: Context, state: State) -> None:
    """Raise ValueError unless `state` is one of this mechanism, for the batch, heads, sizes and dtype of the call."""
    form, wanted = _wanted_state(m, c.q.shape[0], c.sizes, c.q.dtype)
    if form != _state_form(state):
        given = _state_text(state)
        raise ValueError(
            f"the state does not belong to this call of {m}: it should hold {wanted}, and holds {given}; "
            "start from init_state(...) or from a call with need=('out', 'state')"
        )


@functools.lru_cache(maxsize=1024)
def _wanted_state(m: Mechanism, batch: int, s: Sizes, dtype: torch.dtype) -> tuple[Any, str]:
    options: dict[str, Any] = {"heads": s.heads, "dtype": dtype, "device": "meta"}
    state = init_state(m, batch, s.kv_heads, s.head_dim, s.value_dim, **options)
    return _state_form(state), _state_text(state)


def _state_form(state: State) -> Any:
    """Names, dtypes and sizes of what a state holds, its length apart."""
    own = [(n, x.dtype, x.shape[:2], x.shape[3:]) for n, x in sorted(state.tensors.items())]
    return own, [_state_form(s) for s in state.members]


def _state_text(state: State) -> str:
    """What a state holds, its length apart."""
    own = [
        f"{n} {[*x.shape[:2], *x.shape[3:]]} {str(x.dtype).removeprefix('torch.')}"
        for n, x in sorted(state.tensors.items())
    ]
    return ", ".join(own + [f"({_state_text(s)})" for s in state.members])


@functools.lru_cache(maxsize=1024)
def _unkept_streams(m: Pairwise, sizes: Sizes) -> list[str]:
    """Streams of keys that tiles read; those of token maps are used up when a token comes."""
    parts = (p for p in m.parts() if not isinstance(p, TokenMap))
    return [n for p in parts for n, x in p.streams(sizes).items() if x.side == "k"]


def _advance_cache(
    m: Pairwise, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    _check_queries(c)
    new = c.k.shape[2]
    mapped = _mapped(m, c, state)
    unkept = _unkept_streams(m, c.sizes)
    if unkept:
        raise NotSupported(
            f"{m}: a state does not keep streams of keys, such as {unkept[0]}; call it whole instead"
        )
    start, horizon = state.start, m.pairs.horizon if m.static else None
    above, left, _ = m.halo
    if above and (c.mask is not None or any(x.side == "q" for x in m.streams(c.sizes).values())):
        raise NotSupported(
            f"{m} keeps its last {above} queries in the state, but not their masks and streams; call it whole instead"
        )
    q = torch.cat((state.tensors["q"], mapped.q), 2) if above else mapped.q
    horizon = horizon + above + left if horizon is not None else None
    after = _grown(state, request(c, lse).grad, k=mapped.k, v=mapped.v)
    keys, values = after.tensors["k"], after.tensors["v"]
    after = _trimmed(after, horizon)
    latest = {"q": q[:, :, -above:].clone()} if above else {}
    if latest or mapped.tails:
        after = replace(after, tensors=after.tensors | latest | mapped.tails)
    past = state.length > 0
    mask = c.mask if c.mask is None or c.mask.shape[-1] == 1 else c.mask[..., start:]
    bound = replace(mapped, q=q, k=keys, v=values, mask=mask, start=start, decoding=past)
    bound = replace(bound, offset=state.length + new - q.shape[2])
    empty = empty_answer(m, bound, lse)
    out, found = empty if empty is not None else make(m, request(bound, lse, past), kernel).run(bound)
    first = q.shape[2] - new
    if not first:
        return out, found, after
    return out[:, :, first:], None if found is None else found[:, :, first:], after


def _check_queries(c: Context) -> None:
    if c.q.shape[2] != c.k.shape[2]:
        raise ValueError(
            f"with a state every new token brings its query: got {c.q.shape[2]} queries and {c.k.shape[2]} keys"
        )


def _grown(state: State, grad: bool, **new: Tensor) -> State:
    """The state with new rows; with gradients nothing is written in place."""
    after = (replace(state, room={}) if grad else state).appended(**new)
    return replace(after, room={}) if grad else after


def _trimmed(state: State, horizon: int | None) -> State:
    """The state without rows that no later query reads, once they are half of it."""
    rows = next(iter(state.tensors.values())).shape[2]
    if horizon is None or rows < 2 * max(horizon, 8):
        return state
    drop = rows - (horizon - 1)
    kept = {n: x[:, :, drop:].clone() for n, x in state.tensors.items()}
    return State(kept, state.length, state.start + drop)


def _advance_mixer(
    m: Mixer, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    _check_queries(c)
    if not c.k.shape[2]:
        return *zeros(m, c, lse), state
    make(m, request(c, lse), kernel)  # refuses what no kernel runs
    own = m.advance(c, state)
    if own is not None:
        return own[0].to(c.q.dtype), None, own[1]
    after = _grown(state, request(c, lse).grad, **{n: getattr(c, n) for n in m.keeps})
    k, v = (after.tensors.get(n, getattr(c, n)) for n in ("k", "v"))
    bound = replace(c, k=k, v=v, offset=state.length, start=state.start, decoding=state.length > 0)
    empty = empty_answer(m, bound, lse)
    out, found = empty if empty is not None else make(m, request(bound, lse), kernel).run(bound)
    return out, found, _trimmed(after, m.horizon)


def _advance_recurrent(
    m: Recurrent, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    if c.q.shape[2] == 1 and not lse and kernel != "recurrent" and c.q.device.type == "cpu":
        quick = native_step.step(m, c, state)
        if quick is not None:
            return quick[0], None, quick[1]
    c = _mapped(m, c, state)
    carry = Carry(state.tensors["s"], state.tensors["z"], state.tensors["m"])
    why = native_linear.refusals(m, c.q.device.type, c.q.dtype, c.q.shape[-1], c.v.shape[-1])
    if why and kernel == "native_linear":
        raise NotSupported(f"native_linear does not run {m} here: {'; '.join(why)}")
    if not why and kernel != "recurrent":
        out, found, after = native_linear.advance(m, c, carry, lse and isinstance(m.ratio, RowRatio))
    elif c.q.shape[2] == 1 and not lse:
        out, after = step(m, c, carry)
        found = None
    elif c.q.is_cuda and not on_gpu.StateKernel().reasons(m, request(c, lse)):
        out, found, ended = on_gpu.chunked(m, c, carry)
        assert ended is not None
        after = ended
    else:
        out, found, after = chunked(m, c, carry)
    out, found = finish(m, c, out.to(c.q.dtype), found)
    kept = {"s": after.s, "z": after.z, "m": after.m} | c.tails
    return out, found, State(kept, state.length + c.k.shape[2])


def _advance_scan(m: Pairwise, c: Context, state: State) -> tuple[Tensor, Tensor | None, State]:
    wide = torch.promote_types(c.q.dtype, torch.float32)
    c = _mapped(m, c, state)
    s, v = logits_and_values(Program.bind(m, c), wide)
    out, lse = prefixes(s, v, (state.tensors["out"], state.tensors["lse"]))
    kept = {"out": out[:, :, -1], "lse": lse[:, :, -1]} | c.tails
    after = State(kept, state.length + c.k.shape[2])
    return *finish(m, c, out.to(c.q.dtype), lse), after
