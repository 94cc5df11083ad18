"""Gated attention with one head whose queries and keys read moving averages of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from saccade.mechanism import mechanism
from saccade.nn.ema import DampedEMA
from saccade.parts.state import State
from saccade.plan import attend, init_state

WEIGHTS = {"softmax": "rel_bias({clip})", "laplace": "dot(1.0) + per_key + rel_bias({clip}) + laplace"}


@dataclass(frozen=True)
class MegaState:
    """What decoding keeps: the moving averages, and keys and values of the chunk, or of all tokens where there is none."""

    averages: Tensor
    attention: State


class Mega(nn.Module):
    """u H + (1 - u) X: X (B, n, dim) gated with what attention over moving averages of it finds; (B, n, dim) again.

    With X' the damped EMA of X: queries and keys are scales and shifts of silu(X' Wz), values silu(X Wv), r = silu(X' Wr),
    u = sigmoid(X' Wu), H = silu(X' Wh + (r O) Uh) for the attention's O. `weights` is softmax or laplace, whose logits are means
    over the keys of a row; both learn a bias for each distance up to `clip`. With a `chunk` tokens attend inside their own chunk
    only, in linear time, and only the averages cross its borders. Without `causal` the averages run both ways. (Ma et al.,
    Mega: Moving Average Equipped Gated Attention, 2023.)

    >>> Mega(32, chunk=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        query_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        chunk: int | None = None,
        weights: str = "softmax",
        causal: bool = True,
        clip: int = 128,
    ) -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"a chunk has at least 1 token, got {chunk}; leave it out to attend to all")
        query_dim = max(1, dim // 2) if query_dim is None else query_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        if min(query_dim, value_dim) < 1:
            raise ValueError(f"query_dim and value_dim must be at least 1, got {query_dim} and {value_dim}")
        self.mechanism = mechanism(" + ".join(["causal"] * causal + [WEIGHTS[weights].format(clip=clip)]))
        self.chunk, self.causal = chunk, causal
        self.averages = DampedEMA(dim, rank)
        self.back = None if causal else DampedEMA(dim, rank)
        self.shared_proj, self.value_proj = nn.Linear(dim, query_dim), nn.Linear(dim, value_dim)
        self.scales = nn.Parameter(1 + 0.02 * torch.randn(2, query_dim))
        self.shifts = nn.Parameter(torch.zeros(2, query_dim))
        self.rel_bias = nn.Parameter(torch.zeros(1, 2 * clip + 1))
        self.reset_proj, self.update_proj = nn.Linear(dim, value_dim), nn.Linear(dim, dim)
        self.hidden_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(value_dim, dim, bias=False)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The gated features; later tokens than `key_lengths` (B,) are padding."""
        if key_lengths is not None:
            gone = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
            x = x.masked_fill(gone.unsqueeze(-1), 0)
        moved = self.averages(x)
        if self.back is not None:
            moved = moved + self.back(x.flip(1)).flip(1)
        return self._gated(x, moved, self._attend(x, moved, key_lengths))

    def init_state(self, batch: int) -> MegaState:
        """The state before the first token. Raises NotSupported where the layer looks ahead."""
        like, (query_dim, value_dim) = self.rel_bias, (self.scales.shape[1], self.value_proj.out_features)
        own = init_state(self.mechanism, batch, 1, query_dim, value_dim, dtype=like.dtype, device=like.device)
        return MegaState(self.averages.init_state(batch), own)

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        moved, averages = self.averages.step(x, state.averages)
        q, k, v = self._qkv(x, moved)
        own, outs, at = state.attention, [], 0
        while at < x.shape[1]:
            if own.length == self.chunk:
                own = self.init_state(len(x)).attention
            end = x.shape[1] if self.chunk is None else at + self.chunk - own.length
            found = attend(
                q[:, :, at:end],
                k[:, :, at:end],
                v[:, :, at:end],
                self.mechanism,
                state=own,
                need=("out", "state"),
                params={"rel_bias": self.rel_bias},
            )
            assert found.state is not None
            own, at = found.state, end
            outs.append(found.out)
        out = torch.cat(outs, 2) if outs else v
        return self._gated(x, moved, out), MegaState(averages, own)

    def _attend(self, x: Tensor, moved: Tensor, key_lengths: Tensor | None) -> Tensor:
        """What the tokens read, (B, 1, n, value_dim), each chunk as a sample of its own."""
        qkv, n = self._qkv(x, moved), x.shape[1]
        size = n if self.chunk is None else min(self.chunk, n)
        if size == n:
            return attend(*qkv, self.mechanism, key_lengths=key_lengths, params={"rel_bias": self.rel_bias})
        lengths = torch.full((len(x),), n, device=x.device) if key_lengths is None else key_lengths
        starts = torch.arange(0, n, size, device=x.device)
        own = (lengths[:, None] - starts).clamp(0, size).flatten()
        q, k, v = (
            pad(y, (0, 0, 0, -n % size)).unflatten(2, (-1, size)).flatten(0, 2).unsqueeze(1) for y in qkv
        )
        whole = key_lengths is None and n % size == 0
        out = attend(
            q,
            k,
            v,
            self.mechanism,
            key_lengths=None if whole else own,
            params={"rel_bias": self.rel_bias},
        )
        return out.view(len(x), 1, -1, out.shape[-1])[:, :, :n]

    def _qkv(self, x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k (B, 1, n, query_dim), v (B, 1, n, value_dim)."""
        z = silu(self.shared_proj(moved))
        q, k = (z * scale + shift for scale, shift in zip(self.scales, self.shifts, strict=True))
        return q.unsqueeze(1), k.unsqueeze(1), silu(self.value_proj(x)).unsqueeze(1)

    def _gated(self, x: Tensor, moved: Tensor, out: Tensor) -> Tensor:
        reset, update = silu(self.reset_proj(moved)), self.update_proj(moved).sigmoid()
        hidden = silu(self.hidden_proj(moved) + self.out_proj(reset * out.squeeze(1)))
        return update * hidden + (1 - update) * x
