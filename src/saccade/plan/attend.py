"""The functional call: check the inputs, follow the plan, answer what was asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from saccade.cost import Request, Shape
from saccade.errors import NotSupported
from saccade.kernels.recurrent import Carry, chunked, step
from saccade.kernels.scan import logits_and_values, prefixes
from saccade.mechanism import ByHead, Combine, Mechanism, Mixer, Pairwise, Recurrent
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes
from saccade.parts.heads import Heads
from saccade.parts.pair import Context, Program, map_tokens
from saccade.parts.select import Selection
from saccade.parts.state import State
from saccade.plan import inspect
from saccade.plan.choose import combine, finish, make
from saccade.reference import by_head

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORDS = ("out", "lse", "weights", "mass", "state", "selection")


@dataclass(frozen=True)
class Weights:
    """Asks `attend` for the weights of some heads and rows; None means all."""

    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None


class Attended(NamedTuple):
    """What `attend` answers when more than the output is asked for; what was not asked for is None.

    out (B, H, L, E); lse (B, H, L), float32 or wider; weights (B, heads, rows, S); mass (B, H, S), the weight that each key
    receives, summed over queries; state for the next call; selection, a value to replay.
    """

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None
    mass: Tensor | None = None
    state: State | None = None
    selection: Selection | None = None


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    *,
    mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    state: State | None = ...,
    grid: Sequence[int] | None = ...,
    params: dict[str, Tensor] | None = ...,
    streams: dict[str, Tensor] | None = ...,
    buffers: dict[str, Tensor] | None = ...,
    selection: Selection | None = ...,
    kernel: str | None = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    *,
    mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    state: State | None = ...,
    grid: Sequence[int] | None = ...,
    need: Sequence[str | Weights],
    params: dict[str, Tensor] | None = ...,
    streams: dict[str, Tensor] | None = ...,
    buffers: dict[str, Tensor] | None = ...,
    selection: Selection | None = ...,
    kernel: str | None = ...,
) -> Attended: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    state: State | None = None,
    grid: Sequence[int] | None = None,
    need: Sequence[str | Weights] = ("out",),
    params: dict[str, Tensor] | None = None,
    streams: dict[str, Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
    selection: Selection | None = None,
    kernel: str | None = None,
) -> Tensor | Attended:
    """Attention of queries over keys and values, as the mechanism describes it.

    q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) with G dividing H; the answer is (B, H, L, E) in the dtype of q. The
    last query is aligned with the last key. A row that may read no key gives zeros and lse = -inf.

    mask: boolean, broadcastable to (B, H, L, S), True where a pair may attend.
    key_lengths: integers (B,); later keys are padding. With L = S the padding is shared by the queries (self-attention),
        otherwise the L queries are the last L of each sample's keys.
    state: what an earlier call returned; k and v then hold the new tokens only.
    grid: sizes of the axes where tokens are the cells of an image or a volume, row by row, for parts that ask for it.
    need: any of out, lse, weights (or saccade.Weights(heads, rows)), mass, state, selection. The output alone is a tensor,
        more is a named tuple.
    params, streams, buffers: tensors that the mechanism's parts declare, by name (`mechanism.weights(sizes)`...).
    selection: replay the choice of an earlier call instead of choosing anew.
    kernel: demand a kernel by name; otherwise the plan chooses.

    Raises ValueError or TypeError where sizes, dtypes or devices disagree, MechanismError where the text names no
    mechanism, NotSupported, with every kernel's reasons, where nothing can run the request.

    >>> q = k = v = torch.ones(1, 2, 4, 8)
    >>> attend(q, k, v, "causal").shape
    torch.Size([1, 2, 4, 8])
    """
    m = parse(mechanism)
    _check(q, k, v, m, mask, key_lengths, state)
    if grid is not None:
        m = m.on_grid(grid)
        cells = math.prod(grid)
        if state is None and (q.shape[2], k.shape[2]) != (cells, cells):
            raise ValueError(
                f"a grid of {' x '.join(map(str, grid))} has {cells} cells, but there are {q.shape[2]} queries and "
                f"{k.shape[2]} keys"
            )
    words, asked = _needs(need)
    c = Context(q, k, v, 0, 0, key_lengths, mask, params or {}, streams or {}, buffers or {}, selection)
    _check_named(m, c)
    if "state" in words or state is not None:
        out, lse, after = _advance(m, c, state, "lse" in words, kernel)
    else:
        out, lse = _run(m, c, "lse" in words, kernel)
        after = None
    if words == {"out"}:
        return out
    if words & {"weights", "mass", "selection"} and state is not None:
        raise NotSupported(
            "weights, mass and selection are answered for a whole call, not for a step on a state"
        )
    bound = _place(m, c)
    return Attended(
        out,
        lse if "lse" in words else None,
        inspect.weights(m, bound, asked.heads, asked.rows) if "weights" in words else None,
        inspect.mass(m, bound) if "mass" in words else None,
        after if "state" in words else None,
        inspect.selection(m, bound) if "selection" in words else None,
    )


def _needs(need: Sequence[str | Weights]) -> tuple[set[str], Weights]:
    if isinstance(need, str):
        need = (need,)
    words = {"weights" if isinstance(n, Weights) else n for n in need} | {"out"}
    if words - set(WORDS):
        raise ValueError(f"need may name {', '.join(WORDS)}; got {', '.join(sorted(words - set(WORDS)))}")
    asked = [n for n in need if isinstance(n, Weights)]
    return words, asked[0] if asked else Weights()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Mechanism,
    mask: Tensor | None,
    lengths: Tensor | None,
    state: State | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert them with .to(...)"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must share the batch size, got {q.shape[0]}, {k.shape[0]}, {v.shape[0]}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must share heads and length, got {tuple(k.shape[1:3])} and {tuple(v.shape[1:3])}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must share head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    heads, groups = q.shape[1], k.shape[1]
    if not groups or not heads or heads % groups:
        raise ValueError(f"the {groups} key-value heads must divide the {heads} query heads")
    wanted = m.kv_heads(heads)
    if wanted != heads and groups != wanted:
        raise ValueError(f"{m} has {wanted} key-value heads for {heads} query heads, but k has {groups}")
    if isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query and q.shape[2] != 1:
        raise ValueError(
            f"{m} takes one query row a head, (B, H, 1, D), and answers every prefix; q has {q.shape[2]} rows"
        )
    total = k.shape[2] + (state.length if state is not None else 0)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be boolean, True where a pair may attend, got {mask.dtype}; for additive terms use a logits part such as alibi"
            )
        if mask.dim() != 4 or any(
            a not in (1, b) for a, b in zip(mask.shape, (*q.shape[:3], total), strict=True)
        ):
            raise ValueError(
                f"mask must be broadcastable to {(*q.shape[:3], total)}, got {tuple(mask.shape)}"
            )
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device}, q on {q.device}")
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype.is_floating_point or lengths.shape != q.shape[:1]:
            raise ValueError(
                f"key_lengths must be an integer tensor of shape ({q.shape[0]},), got {lengths!r}"
            )
        if lengths.device != q.device:
            raise ValueError(f"key_lengths are on {lengths.device}, q on {q.device}")
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > k.shape[2]):
            raise ValueError(f"key_lengths must lie in 0..{k.shape[2]}, got {lengths.tolist()}")
        if state is not None:
            raise NotSupported(
                "key_lengths with a state: ragged decoding is not kept in one state; decode samples of one length together"
            )


def _check_named(m: Mechanism, c: Context) -> None:
    sizes = c.sizes
    weights = m.weights(sizes)
    layer = {n for p in m.parts() if isinstance(p, Heads) for n in p.weights(sizes)}
    checks: tuple[tuple[dict[str, Tensor], list[str], str], ...] = (
        (c.params, list(weights), "params"),
        (c.buffers, list(m.buffer_names()), "buffers"),
        (c.streams, list(m.streams(sizes)), "streams"),
    )
    for given, declared, what in checks:
        missing = [n for n in declared if n not in given and n not in layer]
        if missing:
            shapes = ", ".join(f"{n} {tuple(weights[n].shape)}" if n in weights else n for n in missing)
            raise ValueError(
                f"{m} needs {what}={{...}} with {shapes}; saccade.nn.Attention owns them by itself"
            )
        unknown = [n for n in given if n not in declared]
        if unknown:
            raise ValueError(
                f"{m} has no {what} called {', '.join(unknown)}; it has {', '.join(declared) or 'none'}"
            )
        for n, x in given.items():
            if x.device != c.q.device:
                raise ValueError(f"{what}[{n!r}] is on {x.device}, q on {c.q.device}")
    for n, stream in m.streams(sizes).items():
        tokens = c.q.shape[2] if stream.side == "q" else c.k.shape[2]
        wanted = stream.shape(c.q.shape[0], c.q.shape[1], tokens)
        if tuple(c.streams[n].shape) != wanted:
            raise ValueError(f"streams[{n!r}] must have shape {wanted}, got {tuple(c.streams[n].shape)}")
    for n, w in weights.items():
        if n in c.params and tuple(c.params[n].shape) != tuple(w.shape):
            raise ValueError(
                f"params[{n!r}] must have shape {tuple(w.shape)}, got {tuple(c.params[n].shape)}"
            )


def _place(m: Mechanism, c: Context) -> Context:
    """Where the queries stand: at the end of the keys."""
    rows, keys = c.q.shape[2], c.k.shape[2]
    if isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query:
        return c
    if c.ends is None:
        return replace(c, offset=keys - rows)
    return replace(c, offset=0 if rows == keys else None)


def _request(c: Context, lse: bool, decoding: bool = False) -> Request:
    b, h, rows, d = c.q.shape
    grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (c.q, c.k, c.v, *c.params.values(), *c.streams.values())
    )
    shape = Shape(b, h, rows, d, c.k.shape[1], c.k.shape[2], c.v.shape[-1])
    return Request(
        shape, c.q.device.type, c.q.dtype, grad, lse, c.mask is not None, c.ends is not None, decoding
    )


def _run(m: Mechanism, c: Context, lse: bool, kernel: str | None) -> tuple[Tensor, Tensor | None]:
    """A whole call, without a state."""
    if isinstance(m, Combine):
        shares = by_head(m, c) if isinstance(m, ByHead) else [c] * len(m.children)
        inner = lse or m.word == "join"
        out, found = combine(
            m, [_run(child, share, inner, kernel) for child, share in zip(m.children, shares, strict=True)]
        )
        if lse and found is None:
            raise NotSupported(f"{m} has no single log-denominator, so no lse")
        return out, found
    c = _place(m, c)
    empty = _empty(m, c, lse)
    if empty is not None:
        return empty
    if isinstance(m, Pairwise | Recurrent):
        c = map_tokens(m.tokens, c, c.k.shape[2])
    return make(m, _request(c, lse), kernel).run(c)


def _empty(m: Mechanism, c: Context, lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """The answer when there is no query, no key or no sample."""
    if c.q.numel() and c.k.numel() and c.v.numel():
        return None
    slots = isinstance(m, Pairwise) and m.slots is not None
    out, found = finish(m, c, *_zeros(m, c, lse or slots))
    return out, found if lse else None


def _zeros(m: Mechanism, c: Context, lse: bool) -> tuple[Tensor, Tensor | None]:
    rows = (
        c.k.shape[2]
        if isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query
        else c.q.shape[2]
    )
    out = c.q.new_zeros(c.q.shape[0], c.q.shape[1], rows, c.v.shape[-1])
    out = out + sum(x[..., :0].sum() for x in (c.q, c.k, c.v))
    wide = torch.promote_types(c.q.dtype, torch.float32)
    return out, torch.full(out.shape[:3], -torch.inf, dtype=wide, device=out.device) if lse else None


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
    if isinstance(m, Recurrent):
        carry = Carry.empty(
            batch, kv_heads, m.feature.size(head_dim), e, torch.empty(0, dtype=wide, device=device)
        )
        return State({"s": carry.s, "z": carry.z, "m": carry.m})
    assert isinstance(m, Pairwise)
    if m.heads is not None and m.heads.learned_query:
        return State(
            {
                "out": torch.zeros(batch, h, e, dtype=wide, device=device),
                "lse": torch.full((batch, h), -torch.inf, dtype=wide, device=device),
            }
        )
    kept = {"k": (kv_heads, head_dim), "v": (kv_heads, e)} | ({"q": (h, head_dim)} if m.halo[0] else {})
    return State({n: torch.empty(batch, g, 0, d, dtype=dtype, device=device) for n, (g, d) in kept.items()})


def _relative(m: Mechanism) -> str:
    never = [m.relative] if isinstance(m, Mixer) else [p.relative for p in m.parts() if p.causal == "never"]
    return never[0] if never else f"'causal + {m}'"


def _advance(
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
            _advance(child, share, s, inner, kernel)
            for child, share, s in zip(m.children, shares, state.members, strict=True)
        ]
        out, joint = combine(m, [(o, x) for o, x, _ in found])
        return out, joint, State({}, state.length + c.k.shape[2], 0, tuple(s for _, _, s in found))
    assert isinstance(m, Pairwise | Recurrent)
    if isinstance(m, Pairwise) and not (m.heads is not None and m.heads.learned_query):
        return _advance_cache(m, c, state, lse, kernel)
    own = "recurrent" if isinstance(m, Recurrent) else "scan"
    if kernel not in (None, own):
        raise NotSupported(f"with a state, {m} is run by {own}, but the call demands {kernel}; leave it out")
    if c.mask is not None:
        raise NotSupported(
            f"the state of {m} cannot follow a mask of single pairs; use key_lengths for padding"
        )
    if not c.k.shape[2]:
        return *_zeros(m, c, lse), state
    return _advance_recurrent(m, c, state, lse) if isinstance(m, Recurrent) else _advance_scan(m, c, state)


def _check_state(m: Mechanism, c: Context, state: State) -> None:
    """Raise ValueError unless `state` is one of this mechanism, for the batch, heads, sizes and dtype of the call."""
    wanted, given = _wanted_state(m, c.q.shape[0], c.sizes, c.q.dtype), _state_text(state)
    if wanted != given:
        raise ValueError(
            f"the state does not belong to this call of {m}: it should hold {wanted}, and holds {given}; "
            "start from init_state(...) or from a call with need=('out', 'state')"
        )


@functools.lru_cache(maxsize=1024)
def _wanted_state(m: Mechanism, batch: int, s: Sizes, dtype: torch.dtype) -> str:
    options: dict[str, Any] = {"heads": s.heads, "dtype": dtype, "device": "meta"}
    return _state_text(init_state(m, batch, s.kv_heads, s.head_dim, s.value_dim, **options))


def _state_text(state: State) -> str:
    """What a state holds, its length apart."""
    own = [
        f"{n} {[*x.shape[:2], *x.shape[3:]]} {str(x.dtype).removeprefix('torch.')}"
        for n, x in sorted(state.tensors.items())
    ]
    return ", ".join(own + [f"({_state_text(s)})" for s in state.members])


def _advance_cache(
    m: Pairwise, c: Context, state: State, lse: bool, kernel: str | None
) -> tuple[Tensor, Tensor | None, State]:
    new = c.k.shape[2]
    if c.q.shape[2] != new:
        raise ValueError(
            f"with a state every new token brings its query: got {c.q.shape[2]} queries and {new} keys"
        )
    mapped = map_tokens(m.tokens, replace(c, offset=state.length, start=state.length), new)
    start, horizon = state.start, m.pairs.horizon if m.static else None
    above, left, _ = m.halo
    if above and (c.mask is not None or any(x.side == "q" for x in m.streams(c.sizes).values())):
        raise NotSupported(
            f"{m} keeps its last {above} queries in the state, but not their masks and streams; call it whole instead"
        )
    q = torch.cat((state.tensors["q"], mapped.q), 2) if above else mapped.q
    horizon = horizon + above + left if horizon is not None else None
    grad = _request(c, lse).grad
    after = (replace(state, room={}) if grad else state).appended(k=mapped.k, v=c.v)
    if grad:
        after = replace(after, room={})
    keys, values = after.tensors["k"], after.tensors["v"]
    if horizon is not None and keys.shape[2] >= 2 * max(horizon, 8):
        drop = keys.shape[2] - (horizon - 1)
        kept = {n: x[:, :, drop:].clone() for n, x in after.tensors.items()}
        after = State(kept, after.length, start + drop)
    if above:
        after = replace(after, tensors=after.tensors | {"q": q[:, :, -above:].clone()})
    past = state.length > 0
    mask = c.mask if c.mask is None or c.mask.shape[-1] == 1 else c.mask[..., start:]
    bound = replace(mapped, q=q, k=keys, v=values, mask=mask, start=start, decoding=past)
    bound = replace(bound, offset=state.length + new - q.shape[2])
    empty = _empty(m, bound, lse)
    out, found = empty if empty is not None else make(m, _request(bound, lse, past), kernel).run(bound)
    first = q.shape[2] - new
    return (
        (out[:, :, first:], None if found is None else found[:, :, first:], after)
        if first
        else (out, found, after)
    )


def _advance_recurrent(
    m: Recurrent, c: Context, state: State, lse: bool
) -> tuple[Tensor, Tensor | None, State]:
    c = map_tokens(m.tokens, replace(c, offset=state.length, start=state.length), c.k.shape[2])
    carry = Carry(state.tensors["s"], state.tensors["z"], state.tensors["m"])
    if c.q.shape[2] == 1 and not lse:
        out, after = step(m, c, carry)
        found = None
    else:
        out, found, after = chunked(m, c, carry)
    out, found = finish(m, c, out.to(c.q.dtype), found)
    return out, found, State({"s": after.s, "z": after.z, "m": after.m}, state.length + c.k.shape[2])


def _advance_scan(m: Pairwise, c: Context, state: State) -> tuple[Tensor, Tensor | None, State]:
    wide = torch.promote_types(c.q.dtype, torch.float32)
    s, v = logits_and_values(Program.bind(m, c), wide)
    out, lse = prefixes(s, v, (state.tensors["out"], state.tensors["lse"]))
    after = State({"out": out[:, :, -1], "lse": lse[:, :, -1]}, state.length + c.k.shape[2])
    return *finish(m, c, out.to(c.q.dtype), lse), after
