"""Attention in two steps: search about sqrt(i) spans by summaries of what came before, then read the few that were found.

Legend: B batch, H heads, L queries, S keys, R rows of equal span length, T spans, k chosen spans, r routing size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context
from saccade.parts.tokens import Rope
from saccade.plan import attend

HELD = 1 << 22  # gathered numbers above which a backward pass gathers anew


def span_length(i: Tensor, scale: float) -> Tensor:
    """Tokens of a span for queries at positions i: ceil(scale sqrt(i + 1))."""
    return torch.ceil(scale * (i + 1).double().sqrt() - 1e-9).long()


def span_grid(i: int, scale: float) -> list[tuple[int, int]]:
    """The candidate spans [lo, hi] of the query at position i: a grid from 0 on, whose last span ends at i."""
    size = int(span_length(torch.tensor(i), scale))
    return [(lo, min(lo + size - 1, i)) for lo in range(0, i + 1, size)]


def scored_pairs(length: int, top: int, scale: float, window: int) -> int:
    """Scores that a head computes for a sequence: of anchors, of keys in chosen spans, and of keys in the window."""
    i = torch.arange(length)
    size = span_length(i, scale)
    anchors = i // size + 1
    read = anchors.clamp(max=top) * size.clamp(max=length)
    return int((anchors + read + (i + 1).clamp(max=window)).sum())


def prefix_summaries(u: Tensor, decay: Tensor, before: Tensor | None = None) -> Tensor:
    """s_j = a s_{j-1} + sqrt(1 - a^2) u_j for u (B, H, n, r), the decay a (H, r) below 1, `before` (B, H, r); by doubling."""
    decay, step = decay[:, None], 1
    u = u * (1 - decay.square()).sqrt()
    s = u if before is None else torch.cat((before.unsqueeze(2), u), 2)
    while step < s.shape[2]:
        s = torch.cat((s[:, :, :step], s[:, :, step:] + decay**step * s[:, :, :-step]), 2)
        step *= 2
    return s if before is None else s[:, :, 1:]


def superlinear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    summaries: Tensor,
    *,
    top: int = 4,
    scale: float = 1.0,
    window: int = 32,
) -> Tensor:
    """out_i = sum over the chosen spans s of p_s o_s, with o_s softmax attention over span s and the last `window` keys.

    q (B, H, L, d), k (B, H, S, d), v (B, H, S, e), the answer (B, H, L, e); the L queries are the last of the S positions.
    The spans of query i tile 0..i by ceil(scale sqrt(i + 1)) tokens. A span scores route_i.s / sqrt(r), route (B, H, L, r),
    with s of summaries (B, H, S, r) where the span ends; the `top` best are chosen, and p is the softmax of their scores,
    through which the search is trained. (Superlinear Multi-Step Attention, 2026.)
    """
    _check(q, k, v, route, summaries, top, scale, window)
    length, keys = q.shape[2], k.shape[2]
    if not length or not q.shape[0]:
        return torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    near = attend(q, k, v, f"window({window})", need=("out", "lse"))
    assert near.lse is not None
    sizes, counts = span_length(torch.arange(keys - length, keys), scale).unique_consecutive(
        return_counts=True
    )
    outs, first = [], 0
    scaled = q * q.shape[-1] ** -0.5, k, v, route * route.shape[-1] ** -0.5, summaries
    tensors = [x.to(wide) for x in (*scaled, near.out, near.lse)]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    each = q.shape[0] * q.shape[1] * top * (q.shape[-1] + v.shape[-1])
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        rows = slice(first, first + count)
        work = (rows, size, top, window, *tensors)
        again = grad and each * count * size > HELD
        outs.append(checkpoint(_rows, *work, use_reentrant=False) if again else _rows(*work))
        first += count
    return torch.cat(outs, 2).to(q.dtype)


def _rows(
    rows: slice,
    size: int,
    top: int,
    window: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    summaries: Tensor,
    near: Tensor,
    near_lse: Tensor,
) -> Tensor:
    """The output of rows whose spans have one size."""
    offset, keys = k.shape[2] - q.shape[2], k.shape[2]
    i = torch.arange(rows.start + offset, rows.stop + offset, device=q.device)
    q, route, near, near_lse = (x[:, :, rows] for x in (q, route, near, near_lse))
    spans = int(i[-1]) // size + 1
    ends = (torch.arange(1, spans + 1, device=q.device) * size - 1).clamp(max=keys - 1)
    scores = route @ summaries[:, :, ends].transpose(-1, -2)
    last = i // size
    own = (route * summaries[:, :, i]).sum(-1, keepdim=True)
    numbers = torch.arange(spans, device=q.device)
    scores = torch.where(numbers == last[:, None], own, scores)
    scores = scores.masked_fill(numbers > last[:, None], -math.inf)
    best, index = scores.topk(min(top, spans), dim=-1)
    shares = torch.softmax(best, -1)
    tokens = index.unsqueeze(-1) * size + torch.arange(size, device=q.device)
    exist = (tokens <= (i - window)[:, None, None]) & torch.isfinite(best).unsqueeze(-1)
    tokens = tokens.clamp(max=keys - 1)
    b, h = q.shape[:2]
    flat = (torch.arange(b * h, device=q.device).view(b, h, 1, 1, 1) * keys + tokens).flatten()
    ks, vs = (x.reshape(-1, x.shape[-1])[flat].view(*tokens.shape, -1) for x in (k, v))
    s = (ks @ q[:, :, :, None, :, None]).squeeze(-1).masked_fill(~exist, -math.inf)
    w, lse = Softmax().normalize(s)
    far = (w.unsqueeze(-2) @ vs).squeeze(-2)
    part = torch.sigmoid(lse - near_lse.unsqueeze(-1)).unsqueeze(-1)
    mixed = part * far + (1 - part) * near.unsqueeze(-2)
    return (shares.unsqueeze(-1) * mixed).sum(-2)


def _check(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, summaries: Tensor, top: int, scale: float, window: int
) -> None:
    right = q.dim() == 4 and k.shape == (*q.shape[:2], k.shape[2], q.shape[3]) and v.shape[:3] == k.shape[:3]
    right = right and route.shape[:3] == q.shape[:3] and summaries.shape == (*k.shape[:3], route.shape[-1])
    if not right or q.shape[2] > k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, route, summaries))
        raise ValueError(
            "superlinear_attention: q is (B, H, L, d), k (B, H, S, d), v (B, H, S, e), route (B, H, L, r) and summaries "
            f"(B, H, S, r) with L at most S; got {shapes}"
        )
    if top < 1 or window < 1 or not scale > 0:
        raise ValueError(
            f"superlinear_attention: top and window must be at least 1 and scale above 0, got top={top}, "
            f"window={window} and scale={scale:g}"
        )


@dataclass(frozen=True)
class SuperlinearState:
    """What decoding keeps: keys, values and summaries of every position."""

    k: Tensor
    v: Tensor
    summaries: Tensor

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.k.shape[2]


class SuperlinearAttention(nn.Module):
    """Causal attention over the `top` spans that a routing query finds, and a window; work grows with the length to 1.5.

    Summaries are a linear recurrence of a map of the input, with a learned decay a channel, remembering 4 to `memory` tokens at
    the start. q and k have rope. x is (B, n, dim), the answer (B, n, dim). (Superlinear Multi-Step Attention, 2026.)

    >>> SuperlinearAttention(32, heads=4, window=4)(torch.zeros(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        top: int = 4,
        scale: float = 1.0,
        window: int = 32,
        route_dim: int = 16,
        memory: int = 64,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % (2 * heads):
            raise ValueError(
                f"dim={dim} must be a multiple of twice heads={heads}, for rope turns pairs of channels"
            )
        if route_dim < 1 or memory < 4:
            raise ValueError(
                f"route_dim must be at least 1 and memory at least 4, got route_dim={route_dim} and memory={memory}"
            )
        if top < 1 or window < 1 or not scale > 0:
            raise ValueError(
                f"top and window must be at least 1 and scale above 0, got top={top}, window={window} and scale={scale:g}"
            )
        self.heads, self.top, self.scale, self.window = heads, top, scale, window
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.route_proj = nn.Linear(dim, heads * route_dim, bias=False)
        self.anchor_proj = nn.Linear(dim, heads * route_dim, bias=False)
        reach = torch.logspace(math.log10(4), math.log10(memory), route_dim).expand(heads, -1)
        self.decay = nn.Parameter(torch.log(reach - 1))

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, ...]:
        """q, k, v (B, H, n, d), routing queries and inputs of the summaries (B, H, n, r) of tokens from `start` on."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        at, c = torch.arange(start, start + x.shape[1], device=x.device)[None], Context(q, k, v)
        q, k = Rope().map(q, at, "q", c), Rope().map(k, at, "k", c)
        route, u = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.route_proj, self.anchor_proj)
        )
        return q, k, v, route, u

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, summaries: Tensor) -> Tensor:
        out = superlinear_attention(
            q, k, v, route, summaries, top=self.top, scale=self.scale, window=self.window
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        if key_lengths is None:
            q, k, v, route, u = self._project(x, 0)
            return self._mix(q, k, v, route, prefix_summaries(u, self.decay.sigmoid()))
        later = (torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]).unsqueeze(-1)
        return self.forward(x.masked_fill(later, 0)).masked_fill(later, 0)

    def init_state(self, batch: int) -> SuperlinearState:
        """The state before the first token."""
        like, size = self.out_proj.weight, self.out_proj.weight.shape[0] // self.heads
        empty = like.new_zeros(batch, self.heads, 0, size)
        return SuperlinearState(empty, empty, like.new_zeros(batch, self.heads, 0, self.decay.shape[1]))

    def step(self, x: Tensor, state: SuperlinearState) -> tuple[Tensor, SuperlinearState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        q, k, v, route, u = self._project(x, state.length)
        before = state.summaries[:, :, -1] if state.length else None
        new = prefix_summaries(u, self.decay.sigmoid(), before)
        k, v, summaries = (
            torch.cat(pair, 2) for pair in ((state.k, k), (state.v, v), (state.summaries, new))
        )
        return self._mix(q, k, v, route, summaries), SuperlinearState(k, v, summaries)
