"""Heads that choose their tokens: a router scores all tokens, a head projects and mixes only the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.nn.attention import Attention
from saccade.nn.padding import without_padding
from saccade.parts.pair import Context
from saccade.parts.state import State
from saccade.parts.tokens import On, Rope
from saccade.plan import attend


@dataclass(frozen=True)
class MoSAState:
    """What decoding keeps: the best keys, values and router scores so far of every sparse head, and the dense heads' state."""

    k: Tensor
    v: Tensor
    scores: Tensor
    length: int
    dense: State | None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, those of the dense heads included."""
        own = sum(x.numel() * x.element_size() for x in (self.k, self.v, self.scores))
        return own + (0 if self.dense is None else self.dense.nbytes)


class MoSA(nn.Module):
    """`sparse` heads that each choose their `top` tokens, beside `dense` heads that read every token; both causal, with rope.

    A head's router r = sigmoid(w.x) ranks all tokens. Only the chosen are projected; they attend to each other in their
    order, with rope at their own positions, and the result times r is added where they stand. Ties go to the earlier token,
    and with `keep_first` the first token is always chosen. (Piekos et al., Mixture of Sparse Attention: Content-Based
    Learnable Sparse Attention via Expert-Choice Routing, 2025.)

    The ranking reads the whole sequence, so membership (not values) leaks the future. The causal form is the running choice,
    `forward(..., running=True)`: a token enters when it is among the `top` best up to itself and leaves when `top` better ones
    have come. `step` computes it with `top` keys a head; whole, it projects every token and masks all pairs.

    >>> MoSA(32, top=4, sparse=6, dense=1, head_dim=8)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    causality = "leak"

    def __init__(
        self,
        dim: int,
        *,
        top: int,
        sparse: int,
        dense: int = 1,
        head_dim: int | None = None,
        keep_first: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1 or top < 1 or sparse < 1 or dense < 0:
            raise ValueError(
                f"dim, top and sparse must be at least 1 and dense at least 0, got dim={dim}, top={top}, "
                f"sparse={sparse} and dense={dense}"
            )
        if head_dim is None and dim % (sparse + dense):
            raise ValueError(f"dim={dim} is not divisible by {sparse + dense} heads; give head_dim")
        size = head_dim or dim // (sparse + dense)
        if size < 2 or size % 2:
            raise ValueError(f"rope turns pairs of channels: head_dim must be even, got {size}")
        self.top, self.sparse, self.size, self.keep_first = top, sparse, size, keep_first
        self.router = nn.Linear(dim, sparse, bias=False)
        self.qkv_proj = nn.Parameter(torch.empty(sparse, dim, 3 * size))
        self.out_proj = nn.Parameter(torch.empty(sparse, size, dim))
        for weight, rows in ((self.qkv_proj, dim), (self.out_proj, sparse * size)):
            nn.init.uniform_(weight, -1 / math.sqrt(rows), 1 / math.sqrt(rows))
        self.dense = Attention(dim, dense, "causal + rope", head_dim=size) if dense else None

    def scores(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """The gates r and the scores that rank, both (B, sparse, n), of tokens x (B, n, dim) from position `start` on."""
        logits = self.router(x).transpose(1, 2)
        ranked = logits.detach()
        if self.keep_first and not start:
            ranked = torch.cat((torch.full_like(ranked[..., :1], math.inf), ranked[..., 1:]), -1)
        return logits.sigmoid(), ranked

    def choose(self, ranked: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """The tokens that each head takes, in order of position (B, sparse, min(top, n)); those of padding come last."""
        if key_lengths is not None:
            later = torch.arange(ranked.shape[-1], device=ranked.device) >= key_lengths[:, None, None]
            ranked = ranked.masked_fill(later, -math.inf)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices
        return best[..., : self.top].sort(-1).values

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None, running: bool = False) -> Tensor:
        """The mixed features (B, n, dim); later tokens than `key_lengths` (B,) are padding."""
        x = without_padding(x, key_lengths)
        gates, ranked = self.scores(x)
        if running:
            out = self._running(x, gates, ranked)
        else:
            out = self._chosen(x, gates, self.choose(ranked, key_lengths), key_lengths)
        if self.dense is not None:
            out = out + self.dense(x, key_lengths=key_lengths)
        return without_padding(out, key_lengths)

    def _chosen(self, x: Tensor, gates: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
        """The sparse heads, from the tokens that they take, index (B, sparse, k)."""
        b, n, dim = x.shape
        rows = (torch.arange(b, device=x.device)[:, None, None] * n + index).flatten()
        taken = x.reshape(-1, dim).index_select(0, rows).view(*index.shape, dim)
        q, k, v = self._project(taken, index)
        found = attend(
            q, k, v, "causal", key_lengths=None if lengths is None else lengths.clamp(max=index.shape[-1])
        )
        mixed = (found * gates.gather(-1, index).unsqueeze(-1)) @ self.out_proj
        return x.new_zeros(b * n, dim).index_add(0, rows, mixed.reshape(-1, dim)).view(b, n, dim)

    def _project(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """q, k and v (B, sparse, k, size) of tokens (B, sparse, k, dim) at positions (B, sparse, k)."""
        q, k, v = (x @ self.qkv_proj).chunk(3, -1)
        return [self._turn(q, positions, "q"), self._turn(k, positions, "k"), v]

    def _turn(self, x: Tensor, positions: Tensor, on: On) -> Tensor:
        flat = x.flatten(0, 1).unsqueeze(1)
        return Rope().map(flat, positions.flatten(0, 1), on, Context(flat, flat, flat)).view(x.shape)

    def alive(self, ranked: Tensor) -> Tensor:
        """Which tokens j are among the `top` best up to i, (B, sparse, n, n), from their scores."""
        n = ranked.shape[-1]
        before = torch.ones(n, n, dtype=torch.bool, device=ranked.device).tril()
        at, other = ranked.unsqueeze(-2), ranked.unsqueeze(-1)
        better = (other > at) | ((other == at) & ~before)
        return (better.cumsum(-2) < self.top) & before

    def _running(self, x: Tensor, gates: Tensor, ranked: Tensor) -> Tensor:
        """The sparse heads by the running choice, over all pairs."""
        b, n, _ = x.shape
        positions = torch.arange(n, device=x.device).expand(b, self.sparse, n)
        q, k, v = self._project(x.unsqueeze(1).expand(-1, self.sparse, -1, -1), positions)
        kept = self.alive(ranked)
        kept = kept & kept.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        found = attend(q, k, v, "full", mask=kept)
        return ((found * gates.unsqueeze(-1)) @ self.out_proj).sum(1)

    def init_state(self, batch: int) -> MoSAState:
        """The state before the first token."""
        empty = self.out_proj.new_zeros(batch, self.sparse, 0, self.size)
        dense = None if self.dense is None else self.dense.init_state(batch)
        return MoSAState(empty, empty, empty[..., 0], 0, dense)

    def step(self, x: Tensor, state: MoSAState) -> tuple[Tensor, MoSAState]:
        """One new token x (B, 1, dim) and the state before it, to its features and the state after: the running choice."""
        if x.shape[1] != 1:
            raise ValueError(f"a step takes one token, got {x.shape[1]}; call the layer for more")
        gates, ranked = self.scores(x, state.length)
        position = torch.full(ranked.shape, state.length, device=x.device)
        q, *new = self._project(x.unsqueeze(1).expand(-1, self.sparse, -1, -1), position)
        k, v = (torch.cat(pair, 2) for pair in zip((state.k, state.v), new, strict=True))
        scores = torch.cat((state.scores, ranked), -1)
        kept = self.choose(scores)
        k, v = (y.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, self.size)) for y in (k, v))
        entered = kept[..., -1:] == scores.shape[-1] - 1
        found = attend(q, k, v, "full") * (gates * entered).unsqueeze(-1)
        out, dense = (found @ self.out_proj).sum(1), state.dense
        if self.dense is not None and dense is not None:
            more, dense = self.dense.step(x, dense)
            out = out + more
        return out, MoSAState(k, v, scores.gather(-1, kept), state.length + 1, dense)
