"""The functional call: check the inputs, follow the plan, answer what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import ByHead, Combine, Mechanism, Pairwise, Recurrent
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Part
from saccade.parts.pair import Context, map_tokens
from saccade.parts.selection import Selection
from saccade.parts.state import State
from saccade.plan import inspect
from saccade.plan.advance import advance
from saccade.plan.check import check, check_grid, check_named
from saccade.plan.choose import combine, make
from saccade.plan.place import empty_answer, place, request
from saccade.reference import by_head

WORDS = ("out", "lse", "weights", "mass", "state", "selection", "losses")


@dataclass(frozen=True)
class Weights:
    """Asks `attend` for the weights of some heads and rows; None means all."""

    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None


class Attended(NamedTuple):
    """What `attend` answers when more than the output is asked for; what was not asked for is None.

    out (B, H, L, E); lse (B, H, L), float32 or wider; weights (B, heads, rows, S); mass (B, H, S), the weight that each key
    receives, summed over queries; state for the next call; selection, a value to replay; losses, scalars by name that the
    mechanism's parts ask training to add to its objective.
    """

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None
    mass: Tensor | None = None
    state: State | None = None
    selection: Selection | None = None
    losses: dict[str, Tensor] | None = None


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
    need: any of out, lse, weights (or saccade.Weights(heads, rows)), mass, state, selection, losses. The output alone is a
        tensor, more is a named tuple.
    params, streams, buffers: tensors that the mechanism's parts declare, by name (`mechanism.weights(sizes)`...).
    selection: replay the choice of an earlier call instead of choosing anew.
    kernel: demand a kernel by name; otherwise the plan chooses.

    Raises ValueError or TypeError where sizes, dtypes or devices disagree, MechanismError where the text names no
    mechanism, NotSupported, with every kernel's reasons, where nothing can run the request.

    >>> import torch
    >>> q = k = v = torch.ones(1, 2, 4, 8)
    >>> attend(q, k, v, "causal").shape
    torch.Size([1, 2, 4, 8])
    """
    m = parse(mechanism)
    check(q, k, v, m, mask, key_lengths, state)
    if grid is not None:
        m = m.on_grid(grid)
    check_grid(m, q, k, state, grid)
    words, asked = _needs(need)
    c = Context(q, k, v, 0, 0, key_lengths, mask, params or {}, streams or {}, buffers or {}, selection)
    check_named(m, c)
    if "state" in words or state is not None:
        out, lse, after = advance(m, c, state, "lse" in words, kernel)
    else:
        out, lse = _run(m, c, "lse" in words, kernel)
        after = None
    if words == {"out"}:
        return out
    if words & {"weights", "mass", "selection", "losses"} and state is not None:
        raise NotSupported(
            "weights, mass, selection and losses are answered for a whole call, not for a step on a state"
        )
    if words <= {"out", "lse", "state"}:
        return Attended(out, lse if "lse" in words else None, state=after if "state" in words else None)
    bound = place(m, c)
    return Attended(
        out,
        lse if "lse" in words else None,
        inspect.weights(m, bound, asked.heads, asked.rows) if "weights" in words else None,
        inspect.mass(m, bound) if "mass" in words else None,
        after if "state" in words else None,
        inspect.selection(m, bound) if "selection" in words else None,
        _losses(m, bound) if "losses" in words else None,
    )


def _losses(m: Mechanism, c: Context) -> dict[str, Tensor]:
    """What the parts ask training to add, those of one name summed."""
    if isinstance(m, Combine):
        shares = by_head(m, c) if isinstance(m, ByHead) else [c] * len(m.children)
        each = [_losses(child, share) for child, share in zip(m.children, shares, strict=True)]
    else:
        c = replace(c, looks_back=m.causal)
        each = [part.losses(_seen_by(part, m, c)) for part in m.parts()]
    found: dict[str, Tensor] = {}
    for losses in each:
        for name, loss in losses.items():
            found[name] = found[name] + loss if name in found else loss
    return found


def _seen_by(part: Part, m: Mechanism, c: Context) -> Context:
    """The context of a part's losses: a score compares what the token maps leave."""
    if part.kind != "score" or type(part).losses is Part.losses or not isinstance(m, Pairwise):
        return c
    return map_tokens(m.tokens, c, c.k.shape[2])


def _needs(need: Sequence[str | Weights]) -> tuple[set[str], Weights]:
    if isinstance(need, str):
        need = (need,)
    words = {"weights" if isinstance(n, Weights) else n for n in need} | {"out"}
    if words - set(WORDS):
        raise ValueError(f"need may name {', '.join(WORDS)}; got {', '.join(sorted(words - set(WORDS)))}")
    asked = [n for n in need if isinstance(n, Weights)]
    return words, asked[0] if asked else Weights()


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
    c = place(m, c)
    empty = empty_answer(m, c, lse)
    if empty is not None:
        return empty
    if isinstance(m, Pairwise | Recurrent):
        c = map_tokens(m.tokens, c, c.k.shape[2])
    return make(m, request(c, lse), kernel).run(c)
