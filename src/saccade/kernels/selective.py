"""A diagonal state whose decay depends on channel and state index, in chunks and step by step.

Inside a chunk every token takes up the one before, then what stands 2, 4... tokens before, so that decays meet as products of
factors of at most one; the state goes from chunk to chunk.
Legend: B batch, n tokens, C channels, N numbers of state a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_n read_tn h_tn with h_t = exp(step_t rate) h_{t-1} + step_t x_t write_t, and the last h.

    x and step (B, n, C), steps not negative; rate (C, N), not positive; write and read (B, n, N); state h (B, C, N), zeros
    unless given. A token whose step is 0 leaves the state as it is. y is (B, n, C) in float32 or wider. (Gu and Dao, Mamba:
    Linear-Time Sequence Modeling with Selective State Spaces, 2023.)
    """
    _check(x, step, rate, write, read, state, chunk)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, step, rate, write, read = (t.to(wide) for t in (x, step, rate, write, read))
    h = x.new_zeros(x.shape[0], *rate.shape) if state is None else state.to(wide)
    if x.shape[1] == 1:
        h = torch.exp(step[:, 0, :, None] * rate) * h + (step * x)[:, 0, :, None] * write
        return (h @ read[:, 0, :, None]).mT, h
    outs = []
    for first in range(0, x.shape[1], chunk):
        cut = slice(first, first + chunk)
        fade = torch.exp(step[:, cut].unsqueeze(-1) * rate)  # (B, T, C, N)
        states = (step * x)[:, cut].unsqueeze(-1) * write[:, cut].unsqueeze(2)
        states = torch.cat((states[:, :1] + fade[:, :1] * h[:, None], states[:, 1:]), 1)
        back = 1
        while back < states.shape[1]:
            taken = torch.addcmul(states[:, back:], fade[:, back:], states[:, :-back])
            states = torch.cat((states[:, :back], taken), 1)
            fade = torch.cat((fade[:, :back], fade[:, back:] * fade[:, :-back]), 1)
            back *= 2
        outs.append((states @ read[:, cut].unsqueeze(-1)).squeeze(-1))
        h = states[:, -1]
    return torch.cat(outs, 1) if outs else x, h


def _check(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor | None, chunk: int
) -> None:
    if chunk < 1:
        raise ValueError(f"selective_scan: chunk must be at least 1, got {chunk}")
    if x.dim() != 3 or step.shape != x.shape or rate.dim() != 2 or rate.shape[0] != x.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, step, rate))
        raise ValueError(
            f"selective_scan: x and step are (B, n, C) and rate (C, N); got x, step, rate {shapes}"
        )
    if not write.shape == read.shape == (*x.shape[:2], rate.shape[1]):
        raise ValueError(
            f"selective_scan: write and read must be {(*x.shape[:2], rate.shape[1])}, got {tuple(write.shape)} and "
            f"{tuple(read.shape)}"
        )
    if state is not None and state.shape != (x.shape[0], *rate.shape):
        raise ValueError(
            f"selective_scan: the state must be {(x.shape[0], *rate.shape)}, got {tuple(state.shape)}"
        )
    if bool((rate > 0).any()) or bool((step < 0).any()):
        raise ValueError(
            "selective_scan: a state that grows is no memory: steps are at least 0 and rates at most 0, as in "
            "softplus(...) and -exp(...)"
        )
