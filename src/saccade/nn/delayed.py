"""Attention that waits: a query reads a bounded memory of keys once the tokens after it have come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.nn.eviction import Eviction, Fifo, KeyValueMemory, pieces
from saccade.parts.normalizer import merge
from saccade.parts.pair import Context
from saccade.parts.tokens import Rope
from saccade.plan import attend


@dataclass(frozen=True)
class DelayedState:
    """What streaming keeps: the memory of keys and values, and the queries (B, H, n, d) that wait for later tokens."""

    memory: KeyValueMemory
    waiting: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.memory.nbytes + self.waiting.numel() * self.waiting.element_size()


class DelayedAttention(nn.Module):
    """Queries that wait for `delay` later tokens and then read a memory of `size` keys, which `evict` keeps from growing.

    Tokens come in chunks of `chunk`; at its end a chunk's keys enter the memory, and who ranks lowest leaves. A query reads
    the memory, or the `top` best keys in it, and the keys of the chunk that have come, up to `delay` after its own. x is
    (B, n, dim), the answer (B, n, dim). With a delay it reads ahead: not for a layer that predicts the next token. (Yang and
    Hua, Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers, 2024.)

    >>> DelayedAttention(32, heads=4, size=16, delay=8, chunk=4)(torch.zeros(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        size: int = 512,
        delay: int = 0,
        chunk: int = 64,
        evict: Eviction | None = None,
        top: int | None = None,
        rope: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if rope and dim % (2 * heads):
            raise ValueError(
                f"rope turns pairs of channels: dim={dim} must be a multiple of twice heads={heads}"
            )
        for name, given in (("size", size), ("chunk", chunk), ("top", top)):
            if given is not None and given < 1:
                raise ValueError(f"{name} must be at least 1, got {given}")
        if delay < 0:
            raise ValueError(f"delay counts later tokens, at least 0, got {delay}")
        if not isinstance(evict, Eviction | None):
            raise TypeError(
                f"evict must be an Eviction such as Fifo(), LeastRecent() or LeastFrequent(), got {evict!r}"
            )
        self.heads, self.size, self.delay, self.chunk = heads, size, delay, chunk
        self.top, self.rope = top, rope
        self.evict = Fifo() if evict is None else evict
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    @property
    def causality(self) -> str:
        """`safe` without a delay, else `leak`."""
        return "leak" if self.delay else "safe"

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        if key_lengths is not None:
            out = torch.zeros_like(x)
            for n in key_lengths.unique().tolist():
                rows = (key_lengths == n).nonzero()[:, 0]
                found = self(x.index_select(0, rows)[:, :n])
                padded = torch.cat((found, out.index_select(0, rows)[:, n:]), 1)
                out = out.index_copy(0, rows, padded)
            return out
        out, state = self.step(x, self.init_state(len(x)))
        return torch.cat((out, self.flush(state)), 1)

    def init_state(self, batch: int) -> DelayedState:
        """The state before the first token."""
        like, size = self.out_proj.weight, self.out_proj.weight.shape[0] // self.heads
        none = like.new_zeros(batch, self.heads, 0, size)
        return DelayedState(KeyValueMemory.empty(none, none), none)

    def step(self, x: Tensor, state: DelayedState) -> tuple[Tensor, DelayedState]:
        """New tokens x (B, n, dim) and the state before them, to the features that are ready and the state after.

        Features come `delay` tokens late: none until so many tokens have come, and the last of them by `flush`.
        """
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        memory, waiting, outs = state.memory, state.waiting, [q[:, :, :0]]
        if self.rope:
            at, c = (
                torch.arange(memory.length, memory.length + x.shape[1], device=x.device)[None],
                Context(q, k, v),
            )
            q, k = Rope().map(q, at, "q", c), Rope().map(k, at, "k", c)
        for cut in pieces(memory.length, x.shape[1], self.chunk):
            new = memory.length % self.chunk + cut.stop - cut.start
            memory = memory.append(k[:, :, cut], v[:, :, cut], self.evict)
            waiting = torch.cat((waiting, q[:, :, cut]), 2)
            ready = max(0, waiting.shape[2] - self.delay)
            first = memory.length - waiting.shape[2]
            at = torch.arange(first, first + ready, device=x.device)
            out, weights = self._read(waiting[:, :, :ready], at, memory, new)
            outs.append(out)
            waiting = waiting[:, :, ready:]
            memory = memory if weights is None else memory.read(weights, at + self.delay, self.evict)
            if memory.length % self.chunk == 0:
                memory = memory.keep(self.size)
        return self._merged(torch.cat(outs, 2)), DelayedState(memory, waiting)

    def flush(self, state: DelayedState) -> Tensor:
        """The features of the queries that still wait, (B, up to delay, dim), when no token follows."""
        memory, q = state.memory, state.waiting
        at = torch.arange(memory.length - q.shape[2], memory.length, device=q.device)
        return self._merged(self._read(q, at, memory, memory.length % self.chunk)[0])

    def _read(self, q: Tensor, at: Tensor, memory: KeyValueMemory, new: int) -> tuple[Tensor, Tensor | None]:
        """What queries (B, H, L, d) at positions (L,) find, and their weights (B, H, L, S) where the eviction asks for them.

        The `new` last keys of the memory are those of the chunk.
        """
        if not len(at):
            return q, None
        need = ("out", "lse", "weights") if self.evict.reads else ("out", "lse")
        old, keys = memory.size - new, torch.arange(memory.length - new, memory.length, device=q.device)
        text = "full" if self.top is None else f"top_keys({self.top})"
        mask = keys <= at[:, None] + self.delay
        found = (
            attend(q, memory.k[:, :, :old], memory.v[:, :, :old], text, need=need),
            attend(q, memory.k[:, :, old:], memory.v[:, :, old:], "full", mask=mask[None, None], need=need),
        )
        out, lse = merge([(part.out, part.lse) for part in found if part.lse is not None])
        if not self.evict.reads:
            return out, None
        shares = [(part.lse - lse).exp().unsqueeze(-1) * part.weights for part in found]  # type: ignore[operator]
        return out, torch.cat(shares, -1)

    def _merged(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))
