"""Positions as accumulated Householder maps: what stands between a key and a query turns the key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    *,
    forget: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Causal softmax over s_ij = k_j.(H_{j+1} ... H_i q_i) / sqrt(d) with H_t = I - beta_t w_t w_t^T.

    q, k, w (B, H, n, d), v (B, H, n, e), beta (B, H, n), the answer (B, H, n, e). `forget` (B, H, n) are log forget gates:
    s_ij gains their sum over j+1..i. Later tokens than `key_lengths` (B,) are padding. Products inside a block of
    `block` tokens are one triangular solve; rows are computed a block at a time, again in the backward pass. (Yang et
    al., PaTH Attention: Position Encoding via Accumulating Householder Transformations, 2025.)
    """
    _check(q, k, v, w, beta, forget, block)
    n, pad, wide = q.shape[2], -q.shape[2] % block, torch.promote_types(q.dtype, torch.float32)
    valid = None if key_lengths is None else torch.arange(n, device=q.device) < key_lengths[:, None, None]

    def blocks(x: Tensor) -> Tensor:
        x = x if valid is None else x.masked_fill(~(valid if x.dim() == 3 else valid.unsqueeze(-1)), 0)
        x = F.pad(x.to(wide), (0, pad) if x.dim() == 3 else (0, 0, 0, pad))
        return x.unflatten(2, (-1, block))

    total = None if forget is None else blocks(forget).flatten(2).cumsum(-1).unflatten(2, (-1, block))
    qs, ks, vs, ws, betas = (blocks(x) for x in (q / math.sqrt(q.shape[-1]), k, v, w, beta))
    inner, start, end, whole = transported(qs, ks, ws, betas)

    def rows(at: int, *tensors: Tensor) -> Tensor:
        inner, start, end, whole, vs, *rest = tensors
        moving, logits = start[:, :, at], [inner[:, :, at].masked_fill(_later(block, q.device), -math.inf)]
        for before in range(at - 1, -1, -1):
            logits.append(moving @ end[:, :, before].mT)
            moving = moving @ whole[:, :, before].mT
        s = torch.cat(logits[::-1], -1)
        if rest:
            s = s + rest[0][:, :, at].unsqueeze(-1) - rest[0][:, :, : at + 1].flatten(2).unsqueeze(2)
        return torch.softmax(s, -1) @ vs[:, :, : at + 1].flatten(2, 3)

    tensors = [inner, start, end, whole, vs] + ([] if total is None else [total])
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    outs = [
        checkpoint(rows, at, *tensors, use_reentrant=False) if grad else rows(at, *tensors)
        for at in range(qs.shape[2])
    ]
    out = torch.cat(outs, 2)[:, :, :n] if outs else torch.zeros_like(v, dtype=wide)
    return (out if valid is None else out.masked_fill(~valid.unsqueeze(-1), 0)).to(q.dtype)


def transported(q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For tokens (..., c, d) of a block: the scores inside it, queries carried to its start, keys to its end, and its product.

    With M = (I + diag(beta) strictlow(w w^T))^-1 diag(beta), transposed, H_{j+1} ... H_i is I - sum w_a M_ab w_b^T over
    j < a <= b <= i.
    """
    eye = torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
    lower = eye + beta.unsqueeze(-1) * (w @ w.mT).tril(-1)
    m = torch.linalg.solve_triangular(lower, torch.diag_embed(beta), upper=False).mT
    key_side, query_side = (k @ w.mT).triu(1) @ m, (w @ q.mT).triu()
    inner = (k @ q.mT - key_side @ query_side).mT
    start = q - (w.mT @ (m @ query_side)).mT
    end = k - key_side @ w
    whole = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) - w.mT @ m @ w
    return inner, start, end, whole


def _later(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, forget: Tensor | None, block: int
) -> None:
    if q.dim() != 4 or not q.shape == k.shape == w.shape or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, w))
        raise ValueError(
            f"path_attention: q, k and w are (B, H, n, d) and v (B, H, n, e); got q, k, v, w {shapes}"
        )
    for name, x in (("beta", beta), ("forget", forget)):
        if x is not None and x.shape != q.shape[:3]:
            raise ValueError(f"path_attention: {name} must be {tuple(q.shape[:3])}, got {tuple(x.shape)}")
    if block < 1:
        raise ValueError(f"path_attention: block must be at least 1, got {block}")


@dataclass(frozen=True)
class PathState:
    """What decoding keeps: keys as all later tokens turned them, values, sums of log forget gates, the last inputs of w."""

    k: Tensor
    v: Tensor
    forget: Tensor
    tail: Tensor

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.k.shape[2]


class PathAttention(nn.Module):
    """Causal attention with PaTH positions: w is a normalised short convolution of a low-rank map of the input.

    beta = 2 sigmoid(u.x); `forget_gate` adds data-dependent decay. x is (B, n, dim), the answer (B, n, dim). (Yang et al.,
    PaTH Attention, 2025.)

    >>> PathAttention(32, heads=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rank: int = 32,
        taps: int = 3,
        forget_gate: bool = False,
        block: int = 64,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if rank < 1 or taps < 1:
            raise ValueError(f"rank and taps must be at least 1, got rank={rank} and taps={taps}")
        self.heads, self.taps, self.block = heads, taps, block
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.low, self.high = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        self.filters = nn.Parameter(torch.zeros(dim, taps))
        nn.init.ones_(self.filters[:, -1:].data)
        self.beta = nn.Linear(dim, heads)
        self.forget = nn.Linear(dim, heads) if forget_gate else None

    def _project(self, x: Tensor, tail: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, w (B, H, n, d), beta and log forget gates (B, H, n), and the tail after them."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        before = torch.cat((tail, self.high(self.low(x))), 1)
        mixed = F.conv1d(before.mT, self.filters.unsqueeze(1), groups=before.shape[-1]).mT
        w = F.normalize(mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2), dim=-1)
        beta = 2 * self.beta(x).sigmoid().transpose(1, 2)
        forget = (
            torch.zeros_like(beta) if self.forget is None else F.logsigmoid(self.forget(x)).transpose(1, 2)
        )
        return q, k, v, w, beta, forget, before[:, before.shape[1] - self.taps + 1 :]

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        tail = x.new_zeros(len(x), self.taps - 1, x.shape[-1])
        *parts, forget, _ = self._project(x, tail)
        gates = None if self.forget is None else forget
        out = path_attention(*parts, forget=gates, key_lengths=key_lengths, block=self.block)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def init_state(self, batch: int) -> PathState:
        """The state before the first token."""
        like, dim = self.out_proj.weight, self.out_proj.weight.shape[0]
        empty = like.new_zeros(batch, self.heads, 0, dim // self.heads)
        return PathState(empty, empty, empty[..., 0], like.new_zeros(batch, self.taps - 1, dim))

    def step(self, x: Tensor, state: PathState) -> tuple[Tensor, PathState]:
        """One new token x (B, 1, dim) and the state before it, to its features and the state after: every key is turned once."""
        if x.shape[1] != 1:
            raise ValueError(f"a step takes one token, got {x.shape[1]}; call the layer for more")
        q, k, v, w, beta, forget, tail = self._project(x, state.tail)
        turned = state.k - beta.unsqueeze(-1) * (state.k @ w.mT) * w
        keys, values = torch.cat((turned, k), 2), torch.cat((state.v, v), 2)
        gates = torch.cat((state.forget + forget, torch.zeros_like(forget)), 2)
        s = q @ keys.mT / math.sqrt(q.shape[-1]) + gates.unsqueeze(2)
        out = torch.softmax(s, -1) @ values
        return self.out_proj(out.transpose(1, 2).flatten(2)), PathState(keys, values, gates, tail)
