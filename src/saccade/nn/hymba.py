"""Attention heads and state-space heads side by side on one input, behind tokens that every token can read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.kernels.selective import selective_scan
from saccade.nn.attention import KeysValues
from saccade.nn.transformer import FeedForward
from saccade.parts.pair import Context
from saccade.parts.tokens import Rope
from saccade.plan import attend

Memory = tuple[Tensor, Tensor]  # h (B, C, N) and the last inputs of the convolution (B, taps - 1, C)


class SelectiveHeads(nn.Module):
    """A state-space layer on `width` channels: h_t = exp(step_t A) h_{t-1} + step_t x_t B_t, y_t = C_t.h_t + D x_t.

    x goes through a short causal convolution first; step, B and C are maps of it, A is a negative number for every channel
    and each of its `state` numbers. x is (B, n, width), the answer y silu(gate). (Gu and Dao, Mamba: Linear-Time Sequence
    Modeling with Selective State Spaces, 2023.)
    """

    def __init__(self, width: int, *, state: int = 16, taps: int = 4, rank: int | None = None) -> None:
        super().__init__()
        if min(width, state, taps) < 1 or (rank is not None and rank < 1):
            raise ValueError(
                f"width, state, taps and rank must be at least 1, got {width}, {state}, {taps} and {rank}"
            )
        rank = rank or -(-width // 16)
        self.sizes = (rank, state, state)
        self.filters = nn.Parameter(torch.empty(width, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.filter_bias = nn.Parameter(torch.zeros(width))
        self.select = nn.Linear(width, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, width)
        first = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step.bias.data.copy_(first.expm1().log())  # softplus of it is the step at the start
        self.log_rate = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def fresh(self, batch: int) -> Memory:
        """The memory before the first token."""
        width, taps = self.filters.shape
        return (
            self.log_rate.new_zeros(batch, *self.log_rate.shape),
            self.filters.new_zeros(batch, taps - 1, width),
        )

    def forward(
        self, x: Tensor, gate: Tensor, memory: Memory | None = None, key_lengths: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """The mixed features (B, n, width) and the memory after them; what stands after `key_lengths` (B,) is padding."""
        h, tail = self.fresh(len(x)) if memory is None else memory
        padding = _padding(x, key_lengths)
        if padding is not None:
            x, gate = x.masked_fill(padding, 0), gate.masked_fill(padding, 0)
        before = torch.cat((tail, x), 1)
        mixed = F.silu(F.conv1d(before.mT, self.filters[:, None], self.filter_bias, groups=x.shape[-1]).mT)
        low, write, read = self.select(mixed).split(self.sizes, -1)
        step = F.softplus(self.step(low))
        if padding is not None:
            step = step.masked_fill(padding, 0)
        y, h = selective_scan(mixed, step, -torch.exp(self.log_rate), write, read, h)
        y = (y + self.skip * mixed).to(x.dtype) * F.silu(gate)
        return y, (h, before[:, before.shape[1] - tail.shape[1] :])


class HymbaMixer(nn.Module):
    """out = W (b1 norm(attention(x)) + b2 norm(ssm(x))), both of the same input, b1 and b2 a learned number a channel.

    Attention has rotary positions and `kv` key-value heads and reads the latest `window` tokens and the first `meta` ones,
    or all earlier tokens where window is None. A mixer that borrows has no keys and values: each call brings those of
    another one. x is (B, n, dim). (Dong et al., Hymba: A Hybrid-head Architecture for Small Language Models, 2024.)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv: int | None = None,
        window: int | None = None,
        meta: int = 0,
        head_dim: int | None = None,
        state: int = 16,
        taps: int = 4,
        borrows: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}, or give head_dim")
        if meta < 0 or (window is not None and window < 1):
            raise ValueError(f"window must be at least 1 and meta at least 0, got {window} and {meta}")
        self.heads, self.kv, self.head_dim = heads, kv or heads, head_dim or dim // heads
        if heads % self.kv or self.head_dim % 2:
            raise ValueError(
                f"kv must divide the heads and head_dim be even, got {heads} heads, kv={self.kv} and head_dim={self.head_dim}"
            )
        near = "" if window is None else f" + window({window})" + (f" + sink({meta})" if meta else "")
        self.mechanism = f"kv_heads({self.kv}) + causal{near}"
        self.window, self.meta, self.borrows = window, meta, borrows
        width = heads * self.head_dim
        self.in_proj = nn.Linear(dim, 3 * width, bias=False)
        self.kv_proj = None if borrows else nn.Linear(dim, 2 * self.kv * self.head_dim, bias=False)
        self.ssm = SelectiveHeads(width, state=state, taps=taps)
        self.attention_scale, self.ssm_scale = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.ones(width)),
        )
        self.out_proj = nn.Linear(width, dim, bias=False)

    def keys_values(self, x: Tensor, start: int = 0) -> KeysValues:
        """Turned keys and values (B, kv, n, head_dim) of tokens from position `start` on, for this mixer and its borrowers."""
        if self.kv_proj is None:
            raise ValueError(
                "this mixer borrows its keys and values: call it with kv=owner.keys_values(...) of the one that has them"
            )
        k, v = self.kv_proj(x).unflatten(-1, (2, self.kv, -1)).permute(2, 0, 3, 1, 4)
        return _turned(k, start), v

    def kept(self, kv: KeysValues) -> KeysValues:
        """What of the keys and values so far a later token can read: the first `meta` and the latest `window` - 1, or all."""
        k, v = kv
        if self.window is None or k.shape[2] < self.meta + self.window:
            return kv
        last = k.shape[2] - self.window + 1
        first = self.meta
        return (
            torch.cat((k[:, :, :first], k[:, :, last:]), 2),
            torch.cat((v[:, :, :first], v[:, :, last:]), 2),
        )

    def forward(
        self,
        x: Tensor,
        *,
        kv: KeysValues | None = None,
        start: int = 0,
        memory: Memory | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """The mixed features of tokens from `start` on, and the memory of the state-space heads after them.

        kv holds keys and values up to the last of these tokens; those of the tokens alone are made where it is None.
        """
        padding = _padding(x, key_lengths)
        x = x if padding is None else x.masked_fill(padding, 0)
        k, v = self.keys_values(x, start) if kv is None else kv
        q, inner, gate = self.in_proj(x).chunk(3, -1)
        q = _turned(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), start)
        attended = attend(q, k, v, self.mechanism, key_lengths=key_lengths).transpose(1, 2).flatten(2)
        scanned, memory = self.ssm(inner, gate, memory, key_lengths)
        joined = self.attention_scale * _norm(attended) + self.ssm_scale * _norm(scanned)
        return self.out_proj(joined), memory


def _padding(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """True where x (B, n, .) holds padding, (B, n, 1)."""
    if lengths is None:
        return None
    return (torch.arange(x.shape[1], device=x.device) >= lengths[:, None]).unsqueeze(-1)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _turned(x: Tensor, start: int) -> Tensor:
    positions = torch.arange(start, start + x.shape[2], device=x.device)[None]
    return Rope().map(x, positions, "k", Context(x, x, x))


@dataclass(frozen=True)
class HymbaState:
    """What decoding keeps: keys and values of each block that makes them, and the memory of every block."""

    caches: tuple[KeysValues, ...]
    memories: tuple[Memory, ...]
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for pair in (*self.caches, *self.memories) for x in pair)


class HymbaBlock(nn.Module):
    """x + mixer(norm x), then x + feed-forward(norm x)."""

    def __init__(self, dim: int, mixer: HymbaMixer) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer, self.feed_forward = mixer, FeedForward(dim)


class HymbaStack(nn.ModuleList):
    """Blocks in order."""

    def __iter__(self) -> Iterator[HymbaBlock]:
        return super().__iter__()  # type: ignore[return-value]


class Hymba(nn.Module):
    """A causal language model of hybrid heads: tokens (B, n) to logits (B, n, vocab).

    `meta` learned tokens stand before each text and are read by every token. The first, the middle and the last block read
    all tokens, the others a window; among these, `share` blocks in a row read the keys and values of the first of them.
    (Dong et al., Hymba, 2024.)

    >>> Hymba(vocab=16, dim=32, depth=3, heads=2, meta=4, window=8)(torch.zeros(1, 10, dtype=torch.long)).shape
    torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 6,
        heads: int = 4,
        *,
        kv: int | None = None,
        window: int = 64,
        meta: int = 16,
        state: int = 16,
        share: int = 2,
    ) -> None:
        super().__init__()
        if depth < 1 or share < 1 or meta < 1:
            raise ValueError(f"depth, share and meta must be at least 1, got {depth}, {share} and {meta}")
        self.tokens = nn.Embedding(vocab, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.meta = nn.Parameter(0.02 * torch.randn(meta, dim))
        whole, run, blocks = {0, (depth - 1) // 2, depth - 1}, 0, []
        for n in range(depth):
            run = 0 if n in whole else run + 1
            mixer = HymbaMixer(
                dim,
                heads,
                kv=kv,
                window=None if n in whole else window,
                meta=meta,
                state=state,
                borrows=run > 0 and (run - 1) % share > 0,
            )
            blocks.append(HymbaBlock(dim, mixer))
        self.blocks, self.norm = HymbaStack(blocks), nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position; later positions than `lengths` (B,) are padding."""
        meta = self.meta.expand(len(tokens), -1, -1)
        ends = None if lengths is None else lengths + len(self.meta)
        x, _ = self._run(torch.cat((meta, self.tokens(tokens)), 1), None, ends)
        return self._logits(x[:, len(self.meta) :])

    def init_state(self, batch: int) -> HymbaState:
        """The state after the meta tokens, before the first token of the text."""
        return self._run(self.meta.expand(batch, -1, -1), None, None)[1]

    def step(self, tokens: Tensor, state: HymbaState) -> tuple[Tensor, HymbaState]:
        """Logits of new tokens (B, n) after those that the state has seen, and the state after them."""
        x, state = self._run(self.tokens(tokens), state, None)
        return self._logits(x), state

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sample after `length` tokens of text, by formula."""
        numbers, seen = 0, len(self.meta) + length
        for block in self.blocks:
            mixer = block.mixer
            rows = seen if mixer.window is None else min(seen, mixer.meta + mixer.window - 1)
            numbers += 0 if mixer.borrows else 2 * mixer.kv * mixer.head_dim * rows
            width, taps = mixer.ssm.filters.shape
            numbers += width * (mixer.ssm.sizes[1] + taps - 1)
        return numbers * self.meta.element_size()

    def _logits(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.tokens.weight.T

    def _run(self, x: Tensor, state: HymbaState | None, ends: Tensor | None) -> tuple[Tensor, HymbaState]:
        start = 0 if state is None else state.length
        old = iter(()) if state is None else iter(state.caches)
        caches, memories, kv = [], [], None
        for n, block in enumerate(self.blocks):
            mixer = block.mixer
            inner = block.norm1(x)
            if not mixer.borrows:
                kv, before = mixer.keys_values(inner, start), next(old, None)
                if before is not None:
                    kv = (torch.cat((before[0], kv[0]), 2), torch.cat((before[1], kv[1]), 2))
                caches.append(mixer.kept(kv))
            memory = None if state is None else state.memories[n]
            mixed, memory = mixer(inner, kv=kv, start=start, memory=memory, key_lengths=ends)
            memories.append(memory)
            x = x + mixed
            x = x + block.feed_forward(block.norm2(x))
        return x, HymbaState(tuple(caches), tuple(memories), start + x.shape[1])
