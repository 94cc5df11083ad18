"""What a call must hold before anything is computed: sizes, dtypes, devices, names."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism
from saccade.parts.base import Sizes, Stream, Weight
from saccade.parts.heads import Heads
from saccade.parts.pair import Context
from saccade.parts.state import State

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Mechanism,
    mask: Tensor | None,
    lengths: Tensor | None,
    state: State | None,
) -> None:
    """Raise ValueError or TypeError unless q, k, v, mask and lengths agree with each other and with the mechanism."""
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
        raise ValueError(
            f"the {groups} key-value heads must divide the {heads} query heads, and there is at least one of each"
        )
    wanted = m.kv_heads(heads)
    if wanted != heads and groups != wanted:
        raise ValueError(f"{m} has {wanted} key-value heads for {heads} query heads, but k has {groups}")
    if m.learned_query and q.shape[2] != 1:
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


def check_grid(m: Mechanism, q: Tensor, k: Tensor, state: State | None, grid: Sequence[int] | None) -> None:
    """Raise ValueError unless the tokens are all cells of the grid, or its first ones where no later cell is read."""
    rows, keys = q.shape[2], k.shape[2] + (state.length if state is not None else 0)
    for cells_of in {tuple(grid)} if grid is not None and not m.grids else m.grids:
        if cells_of is None:
            raise NotSupported(f"{m} stands on a grid: give one, as in attend(..., grid=(h, w))")
        cells = math.prod(cells_of)
        if keys > cells or (state is None and rows != keys) or (keys != cells and not m.causal):
            raise ValueError(
                f"a grid of {' x '.join(map(str, cells_of))} has {cells} cells, but there are {rows} queries and "
                f"{keys} keys"
            )


class Declared(NamedTuple):
    """What a mechanism declares for some sizes; `layer` are weights that a layer uses before the call."""

    weights: dict[str, Weight]
    streams: dict[str, Stream]
    buffers: list[str]
    layer: set[str]


@functools.lru_cache(maxsize=4096)
def declared(m: Mechanism, sizes: Sizes) -> Declared:
    """The names and shapes that a call must bring."""
    layer = {n for p in m.parts() if isinstance(p, Heads) for n in p.weights(sizes)}
    return Declared(m.weights(sizes), m.streams(sizes), list(m.buffer_names()), layer)


def check_named(m: Mechanism, c: Context) -> None:
    """Raise ValueError unless params, streams and buffers are those that the mechanism declares, in their shapes."""
    weights, streams, buffers, layer = declared(m, c.sizes)
    checks: tuple[tuple[dict[str, Tensor], list[str], str], ...] = (
        (c.params, list(weights), "params"),
        (c.buffers, buffers, "buffers"),
        (c.streams, list(streams), "streams"),
    )
    for given, known, what in checks:
        missing = [n for n in known if n not in given and n not in layer]
        if missing:
            shapes = ", ".join(f"{n} {tuple(weights[n].shape)}" if n in weights else n for n in missing)
            raise ValueError(
                f"{m} needs {what}={{...}} with {shapes}; saccade.nn.Attention owns them by itself"
            )
        unknown = [n for n in given if n not in known]
        if unknown:
            raise ValueError(
                f"{m} has no {what} called {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
            )
        for n, x in given.items():
            if x.device != c.q.device:
                raise ValueError(f"{what}[{n!r}] is on {x.device}, q on {c.q.device}")
    for n, stream in streams.items():
        tokens = c.q.shape[2] if stream.side == "q" else c.k.shape[2]
        wanted = stream.shape(c.q.shape[0], c.q.shape[1], tokens)
        if tuple(c.streams[n].shape) != wanted:
            raise ValueError(f"streams[{n!r}] must have shape {wanted}, got {tuple(c.streams[n].shape)}")
    for n, w in weights.items():
        if n in c.params and tuple(c.params[n].shape) != tuple(w.shape):
            raise ValueError(
                f"params[{n!r}] must have shape {tuple(w.shape)}, got {tuple(c.params[n].shape)}"
            )
