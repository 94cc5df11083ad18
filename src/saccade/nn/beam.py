"""Beam search over any model that scores the next token and can reorder its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


@torch.no_grad()
def beam_search(
    step: Callable[[Tensor, S], tuple[Tensor, S]],
    select: Callable[[S, Tensor], S],
    state: S,
    first: Tensor,
    width: int,
    length: int,
    end: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best of the sequences that a beam of `width` keeps, (B, length), and its score (B,).

    `step(tokens, state)` gives the scores (B width, choices) of what follows and the state after it, the rows of a sample
    side by side; `state` holds as many rows already. `select(state, rows)` reorders them. Scores add up. `first` (B,) are
    the tokens before the first choice. A sequence that has chosen `end` goes on with it for nothing.
    """
    batch = len(first)
    sample = torch.arange(batch, device=first.device)[:, None]
    token = first.repeat_interleave(width)
    found = torch.empty(batch, width, 0, dtype=torch.long, device=first.device)
    over = torch.zeros(batch, width, dtype=torch.bool, device=first.device)
    total: Tensor | None = None
    for _ in range(length):
        scores, state = step(token, state)
        choices = scores.shape[-1]
        scores = scores.view(batch, width, choices)
        if total is None:  # the rows of a sample are still the same: only the first may choose
            total = torch.full_like(scores[..., 0], -torch.inf)
            total[:, 0] = 0.0
        if end is not None:
            stay = torch.full_like(scores[0, 0], -torch.inf)
            stay[end] = 0.0
            scores = torch.where(over.unsqueeze(-1), stay, scores)
        total, best = (total.unsqueeze(-1) + scores).flatten(1).topk(width, 1)
        parent, index = best // choices, best % choices
        found = torch.cat((found[sample, parent], index.unsqueeze(-1)), -1)
        over = over[sample, parent] | (index == end)
        state = select(state, (sample * width + parent).flatten())
        token = index.flatten()
    assert total is not None
    return found[:, 0], total[:, 0]
