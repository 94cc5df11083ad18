"""Attention with a long memory that learns while it reads: as context, as a gate, or as a layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from saccade.mechanism import mechanism
from saccade.nn.memory import NeuralMemory, NeuralMemoryState, recall
from saccade.nn.padding import without_padding
from saccade.parts.normalizer import merge
from saccade.parts.state import State
from saccade.plan import attend, init_state


class PersistentAttention(nn.Module):
    """Attention by a causal mechanism over tokens x (B, n, dim) and `persistent` learned ones, which all may read.

    The learned ones stand in no order: their softmax is merged with that of the tokens. (Behrouz et al., Titans, 2024;
    Sukhbaatar et al., Augmenting Self-attention with Persistent Memory, 2019.)
    """

    def __init__(self, dim: int, heads: int, text: str, persistent: int) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if persistent < 0:
            raise ValueError(f"persistent must be at least 0, got {persistent}")
        self.mechanism, self.heads = mechanism(text), heads
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """The mixed features, and the state after where one was given."""
        q, k, v = self._qkv(x)
        need = ("out", "lse") if state is None else ("out", "lse", "state")
        found = attend(q, k, v, self.mechanism, state=state, need=need)
        assert found.lse is not None
        out = found.out
        if len(self.persistent):
            _, k, v = (y.expand(len(x), -1, -1, -1) for y in self._qkv(self.persistent[None]))
            more = attend(q, k, v, "full", need=("out", "lse"))
            assert more.lse is not None
            out, _ = merge([(out, found.lse), (more.out, more.lse)])
        return self.out_proj(out.transpose(1, 2).flatten(2)), found.state

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        like, dim = self.out_proj.weight, self.out_proj.weight.shape[0]
        size = dim // self.heads
        return init_state(self.mechanism, batch, self.heads, size, dtype=like.dtype, device=like.device)


class Gate(nn.Module):
    """g y + (1 - g) m for y and m (B, n, dim), both normalised with learned scales, and g a sigmoid of the two."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms, self.gate = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2)), nn.Linear(2 * dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, y: Tensor, answers: Tensor) -> Tensor:
        y, answers = self.norms[0](y), self.norms[1](answers)
        return self.out_proj(answers + self.gate(torch.cat((y, answers), -1)).sigmoid() * (y - answers))


@dataclass(frozen=True)
class TitansState:
    """What decoding keeps: the memory, and the keys and values that attention still reads."""

    memory: NeuralMemoryState
    attention: State


class AttentionAndMemory(nn.Module):
    """A layer of attention and a memory, which decode from the states of both."""

    attention: PersistentAttention
    memory: NeuralMemory

    def init_state(self, batch: int) -> TitansState:
        """The state before the first token."""
        return TitansState(self.memory.init_state(batch), self.attention.init_state(batch))


class MemoryAsContext(AttentionAndMemory):
    """MAC: attention inside segments over persistent tokens, what the memory recalls for each token, and the tokens;
    then a gate between the answers y of attention and M(y), where M learns from y. x is (B, n, dim), the answer too.

    The memory recalls as it was before the segment, whose length is its chunk. No token sees a later one, nor what is recalled
    for a later one. (Behrouz et al., Titans: Learning to Memorize at Test Time, 2024.)

    >>> MemoryAsContext(32, heads=2, segment=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, segment: int = 32, persistent: int = 4, depth: int = 1
    ) -> None:
        super().__init__()
        if segment < 1:
            raise ValueError(f"a segment has at least 1 token, got {segment}")
        self.segment = segment
        self.attention = PersistentAttention(dim, heads, "causal + rope", persistent)
        self.memory = NeuralMemory(dim, heads, depth=depth, chunk=segment)
        self.ask_proj = nn.Linear(dim, dim, bias=False)
        self.gate = Gate(dim)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        return self.step(without_padding(x, key_lengths), self.init_state(len(x)))[0]

    def step(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        outs, at = [], 0
        while at < x.shape[1]:
            seen = state.memory.memory.length % self.segment
            end = at + self.segment - seen
            own = state.attention if seen else self.attention.init_state(len(x))
            out, state = self._segment(x[:, at:end], TitansState(state.memory, own))
            outs.append(out)
            at = end
        return torch.cat(outs, 1) if outs else x, state

    def _segment(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        q = normalize(self.ask_proj(x).unflatten(-1, (self.memory.heads, -1)).transpose(1, 2), dim=-1)
        start = state.memory.memory.start
        recalled = self.memory.told(recall(start, q.to(start[0].dtype)).to(x.dtype))
        mixed, own = self.attention(torch.stack((recalled, x), 2).flatten(1, 2), state.attention)
        y = mixed[:, 1::2]
        answers, memory = self.memory.step(y, state.memory)
        return self.gate(y, answers), TitansState(memory, own)


class MemoryAsGate(AttentionAndMemory):
    """MAG: a gate between attention in a window and M(x). x is (B, n, dim), the answer too.

    (Behrouz et al., Titans: Learning to Memorize at Test Time, 2024.)

    >>> MemoryAsGate(32, heads=2, window=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 32,
        persistent: int = 4,
        depth: int = 1,
        chunk: int = 16,
    ) -> None:
        super().__init__()
        self.attention = PersistentAttention(dim, heads, f"rope + window({window})", persistent)
        self.memory = NeuralMemory(dim, heads, depth=depth, chunk=chunk)
        self.gate = Gate(dim)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        x = without_padding(x, key_lengths)
        return self.gate(self.attention(x)[0], self.memory(x))

    def step(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        y, own = self.attention(x, state.attention)
        answers, memory = self.memory.step(x, state.memory)
        return self.gate(y, answers), TitansState(memory, own)


class MemoryAsLayer(AttentionAndMemory):
    """MAL: attention in a window over x + M(x), a memory stacked under it. x is (B, n, dim), the answer too.

    (Behrouz et al., Titans: Learning to Memorize at Test Time, 2024.)

    >>> MemoryAsLayer(32, heads=2, window=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 32,
        persistent: int = 4,
        depth: int = 1,
        chunk: int = 16,
    ) -> None:
        super().__init__()
        self.memory = NeuralMemory(dim, heads, depth=depth, chunk=chunk)
        self.attention = PersistentAttention(dim, heads, f"rope + window({window})", persistent)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        x = without_padding(x, key_lengths)
        return self.attention(x + self.memory(x))[0]

    def step(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        answers, memory = self.memory.step(x, state.memory)
        y, own = self.attention(x + answers, state.attention)
        return y, TitansState(memory, own)
