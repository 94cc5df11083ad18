"""Attention that walks along its keys: a Gaussian whose centre moves on from the mean of the row before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

STEPS = ("one", "relu", "sigmoid")


class MonotonicLocation(nn.Module):
    """a_j ~ exp(-(p_j - mu)^2 / 2 sigma^2) at p_j = j / (L - 1): weights by position, one row after another.

    mu is the mean position of the row before, plus step / (L - 1); the step is 1 (`one`), or relu or sigmoid of w.q. sigma is
    (relu(w_s.q) + 0.27) / L. Before the first row the mean stands one key before the first. `mix` learns a gate that
    mixes in softmax(q.k). (Chowdhury and Caragea, Monotonic Location Attention for Length Generalization, 2023.)
    """

    def __init__(self, dim: int, step: str = "relu", *, mix: bool = False) -> None:
        super().__init__()
        if step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
        self.kind = step
        self.advance = None if step == "one" else nn.Linear(dim, 1)
        self.width = nn.Linear(dim, 1)
        self.gate = nn.Linear(dim, 1) if mix else None

    def start(self, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean before the first row, (B,), for keys of `lengths` (B,)."""
        return -1.0 / (lengths - 1).clamp_min(1).to(dtype)

    def step(self, q: Tensor, keys: Tensor, mean: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One row: queries q (B, dim), keys (B, S, dim), the mean before (B,) to weights (B, S), the mean after, and mu."""
        last = (lengths - 1).clamp_min(1).to(q.dtype)
        at = torch.arange(keys.shape[1], device=q.device)
        there = at < lengths[:, None]
        place = at / last[:, None]
        if self.advance is None:
            step = torch.ones_like(mean)
        else:
            step = self.advance(q).squeeze(-1)
            step = relu(step) if self.kind == "relu" else step.sigmoid()
        mu = mean + step / last
        sigma = (relu(self.width(q)) + 0.27) / lengths[:, None].clamp_min(1)
        s = -((place - mu[:, None]) ** 2) / (2 * sigma**2)
        weights = torch.softmax(s.masked_fill(~there, -torch.inf), -1)
        if self.gate is not None:
            content = (keys.masked_fill(~there.unsqueeze(-1), 0) @ q.unsqueeze(-1)).squeeze(-1) / q.shape[
                -1
            ] ** 0.5
            g = self.gate(q).sigmoid()
            weights = g * weights + (1 - g) * torch.softmax(content.masked_fill(~there, -torch.inf), -1)
        return weights, (weights * place.masked_fill(~there, 0)).sum(-1), mu

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, dim), keys (B, S, dim), values (B, S, e), to the mixed values (B, T, e), weights (B, T, S) and mu (B, T)."""
        if keys.shape[:2] != values.shape[:2] or q.shape[0] != keys.shape[0]:
            raise ValueError(
                f"keys and values must share batch and length, got {tuple(keys.shape)} and {tuple(values.shape)} "
                f"for queries {tuple(q.shape)}"
            )
        lengths = torch.full((len(q),), keys.shape[1], device=q.device) if lengths is None else lengths
        if lengths.numel() and int(lengths.min()) < 1:
            raise ValueError(f"every sample needs a key to stand on, got lengths {lengths.tolist()}")
        gone = torch.arange(keys.shape[1], device=q.device) >= lengths[:, None]
        mean, rows, centres = self.start(lengths, q.dtype), [], []
        for t in range(q.shape[1]):
            weights, mean, mu = self.step(q[:, t], keys, mean, lengths)
            rows.append(weights)
            centres.append(mu)
        w = torch.stack(rows, 1) if rows else q.new_zeros(len(q), 0, keys.shape[1])
        mixed = w @ values.masked_fill(gone.unsqueeze(-1), 0)
        return mixed, w, torch.stack(centres, 1) if centres else q.new_zeros(len(q), 0)


class MonotonicSeq2Seq(nn.Module):
    """A bidirectional GRU reads a string, a GRU writes another; the reader is walked along, or backwards.

    A gate of the whole string mixes its encoding with the reversed one, so that one model can learn either direction.
    `step=None` attends by content instead. (Chowdhury and Caragea, 2023.)
    """

    def __init__(self, vocab: int, dim: int = 32, step: str | None = "relu", *, mix: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.encoder = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.cell, self.readout = nn.GRUCell(2 * dim, dim), nn.Linear(2 * dim, vocab)
        self.location = None if step is None else MonotonicLocation(dim, step, mix=mix)
        self.direction, self.query = nn.Linear(dim, 1), nn.Linear(dim, dim)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The encoding (B, S, dim), in the learned direction, and the decoder's first state (B, dim)."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(source), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        whole = last.transpose(0, 1).flatten(1)
        at = torch.arange(source.shape[1], device=source.device)
        back = torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
        forward = self.direction(whole).sigmoid().unsqueeze(-1)
        turned = memory.gather(1, back.unsqueeze(-1).expand_as(memory))
        return forward * memory + (1 - forward) * turned, whole

    def forward(self, source: Tensor, lengths: Tensor, first: int, target: Tensor) -> Tensor:
        """Logits (B, T, vocab) of a target (B, T), after the token `first` and then the target's own tokens."""
        return self._decode(source, lengths, first, target.shape[1], target)

    @torch.no_grad()
    def greedy(self, source: Tensor, lengths: Tensor, first: int, length: int) -> Tensor:
        """The likeliest next token, `length` times, after the token `first`: (B, length)."""
        return self._decode(source, lengths, first, length, None).argmax(-1)

    def _decode(
        self, source: Tensor, lengths: Tensor, first: int, steps: int, target: Tensor | None
    ) -> Tensor:
        memory, h = self.encode(source, lengths)
        token, context, logits = torch.full_like(source[:, 0], first), torch.zeros_like(h), []
        mean = None if self.location is None else self.location.start(lengths, h.dtype)
        gone = torch.arange(memory.shape[1], device=h.device) >= lengths[:, None]
        for t in range(steps):
            h = self.cell(torch.cat((self.embedding(token), context), -1), h)
            q = self.query(h)
            if self.location is not None and mean is not None:
                weights, mean, _ = self.location.step(q, memory, mean, lengths)
            else:
                s = (memory @ q.unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5
                weights = torch.softmax(s.masked_fill(gone, -torch.inf), -1)
            context = (weights.unsqueeze(1) @ memory).squeeze(1)
            logits.append(self.readout(torch.cat((h, context), -1)))
            token = logits[-1].argmax(-1) if target is None else target[:, t].clamp_min(0)
        return torch.stack(logits, 1)
