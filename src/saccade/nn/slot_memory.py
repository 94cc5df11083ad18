"""Attention inside chunks, and to a few slots that sum up the chunks before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.nn.attention import Attention
from saccade.nn.eviction import pieces
from saccade.nn.padding import without_padding
from saccade.parts.state import State


@dataclass(frozen=True)
class SlotState:
    """What streaming keeps: the state and the tokens (B, n, dim) of the chunk that is not yet full, and the slots (B, m, dim)."""

    chunk: State
    tokens: Tensor
    slots: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.chunk.nbytes + sum(x.numel() * x.element_size() for x in (self.tokens, self.slots))


class SlotMemoryAttention(nn.Module):
    """Causal attention with rope inside chunks of `chunk` tokens, plus a gated read of the last `slots` memory slots.

    At its end a chunk is pooled by a learned query a head to a summary s; the new slot is g s + (1 - g) m with the latest
    slot m, at first zero, and g = sigmoid(W [s; m]), and the oldest slot is dropped. out = chunk + sigmoid(G x) * read;
    without slots, attention inside chunks alone. x is (B, n, dim), the answer (B, n, dim). (As described in Kashyap,
    Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling, 2025.)

    >>> SlotMemoryAttention(32, heads=4, chunk=8, slots=3)(torch.zeros(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(self, dim: int, heads: int, *, chunk: int = 64, slots: int = 16) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % (2 * heads):
            raise ValueError(
                f"dim={dim} must be a multiple of twice heads={heads}, for rope turns pairs of channels"
            )
        if chunk < 1 or slots < 0:
            raise ValueError(f"chunk must be at least 1 and slots at least 0, got {chunk} and {slots}")
        self.chunk, self.slots = chunk, slots
        self.near = Attention(dim, heads, "causal + rope")
        if slots:
            self.pool, self.far = Attention(dim, heads, "learned_queries"), Attention(dim, heads)
            self.write_gate, self.read_gate = nn.Linear(2 * dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding. All chunks are read at once."""
        if key_lengths is not None:
            return without_padding(self.forward(without_padding(x, key_lengths)), key_lengths)
        batch, n, dim = x.shape
        count = -(-n // self.chunk)
        chunks = F.pad(x, (0, 0, 0, count * self.chunk - n)).reshape(-1, self.chunk, dim)
        out = self.near(chunks)
        if self.slots and n:
            slots, there = self._windows(self.pool(chunks).view(batch, count, dim))
            out = out + self._recalled(chunks, slots.flatten(0, 1), there.repeat(batch, 1))
        return out.view(batch, count * self.chunk, dim)[:, :n]

    def _windows(self, summaries: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that each chunk reads (B, N, slots, dim), and which of them there are (N, slots), from summaries (B, N, dim)."""
        count, latest, made = summaries.shape[1], torch.zeros_like(summaries[:, 0]), []
        for summary in summaries.unbind(1)[:-1]:
            latest = self._written(summary, latest)
            made.append(latest)
        padded = torch.stack([torch.zeros_like(latest)] * self.slots + made, 1)
        at = torch.arange(count, device=latest.device)[:, None] + torch.arange(
            self.slots, device=latest.device
        )
        return padded[:, at], at >= self.slots

    def _written(self, summary: Tensor, latest: Tensor) -> Tensor:
        """The slot that follows the latest one, both (B, dim)."""
        gate = self.write_gate(torch.cat((summary, latest), -1)).sigmoid()
        return gate * summary + (1 - gate) * latest

    def _recalled(self, x: Tensor, slots: Tensor, there: Tensor | None = None) -> Tensor:
        """What tokens (B, n, dim) read in slots (B, m, dim), gated; `there` (B, m) says which slots exist."""
        mask = None if there is None else there[:, None, None]
        return self.read_gate(x).sigmoid() * self.far(x, slots, mask=mask)

    def init_state(self, batch: int) -> SlotState:
        """The state before the first token."""
        none = self.near.out_proj.weight.new_zeros(batch, 0, self.near.out_proj.weight.shape[0])
        return SlotState(self.near.init_state(batch), none, none)

    def step(self, x: Tensor, state: SlotState) -> tuple[Tensor, SlotState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        outs = [x[:, :0]]
        for cut in pieces(state.tokens.shape[1], x.shape[1], self.chunk):
            piece = x[:, cut]
            out, near = self.near.step(piece, state.chunk)
            outs.append(out + self._recalled(piece, state.slots) if self.slots else out)
            state = SlotState(near, torch.cat((state.tokens, piece), 1), state.slots)
            if state.tokens.shape[1] == self.chunk:
                state = self._closed(state)
        return torch.cat(outs, 1), state

    def _closed(self, state: SlotState) -> SlotState:
        """The state after the last token of a chunk."""
        after = self.init_state(len(state.tokens))
        if not self.slots:
            return after
        old = state.slots
        latest = old[:, -1] if old.shape[1] else torch.zeros_like(state.tokens[:, 0])
        new = self._written(self.pool(state.tokens)[:, 0], latest)
        return SlotState(after.chunk, after.tokens, torch.cat((old, new[:, None]), 1)[:, -self.slots :])
