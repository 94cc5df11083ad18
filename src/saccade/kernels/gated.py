"""States that decay by channel or overwrite, in chunks: all chunks of a group at once, then the state from chunk to chunk.

Inside a chunk what a token writes solves a unit lower triangular system (the WY form), so that no token waits for
the one before. Decays meet as differences of cumulated logarithms, never as powers below zero. (Yang et al.,
Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024; Gated Delta Networks, 2025.)

Legend: b batch, g state heads, r query heads a state head, N chunks of C tokens, m feature size, e value size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK, BLOCK, GROUP = 64, 16, 16


def below(size: int, device: torch.device, own: bool = True) -> Tensor:
    """True where a column is an earlier token than the row, or the same one."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(0 if own else -1)


def paths(log: Tensor) -> Tensor:
    """Sums of log (..., C) over j < t <= i, (..., C, C), -inf where j > i: exact however large the sums before them."""
    size = log.shape[-1]
    steps = log.unsqueeze(-1).expand(*log.shape, size).masked_fill(~below(size, log.device, own=False), 0.0)
    return steps.cumsum(-2).masked_fill(~below(size, log.device), -torch.inf)


def decayed(x: Tensor, y: Tensor, log: Tensor | None) -> Tensor:
    """Products (..., C, C) of x_i and y_j (..., C, m), decayed from j to i, zeros where j > i; log is (..., C, 1 or m) or None."""
    if log is None:
        return (x @ y.mT).tril()
    if log.shape[-1] == 1:
        return (x @ y.mT) * torch.exp(paths(log[..., 0]))
    size = x.shape[-2]
    sums = log.cumsum(-2)
    rows = []
    for start in range(0, size, BLOCK):
        end = min(size, start + BLOCK)
        xs, here = x[..., start:end, :], sums[..., start:end, :]
        gap = (here.unsqueeze(-2) - here.unsqueeze(-3)).masked_fill(
            ~below(end - start, x.device).unsqueeze(-1), -torch.inf
        )
        near = (xs.unsqueeze(-2) * y[..., start:end, :].unsqueeze(-3) * torch.exp(gap)).sum(-1)
        if start:
            edge = sums[..., start - 1 : start, :]
            far = (xs * torch.exp(here - edge)) @ (
                y[..., :start, :] * torch.exp(edge - sums[..., :start, :])
            ).mT
            near = torch.cat((far, near), -1)
        rows.append(pad(near, (0, size - end)))
    return torch.cat(rows, -2)


def far_pairs(size: int) -> int:
    """Pairs of a chunk that meet as matrix products where decay differs by channel."""
    return sum((min(size, start + BLOCK) - start) * start for start in range(0, size, BLOCK))


def group(
    fq: Tensor, fk: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None, s: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Some chunks: fq (b, g, r, N, C, m), fk (b, g, N, C, m), v (b, g, N, C, e), log (b or 1, g, N, C, 1 or m), beta (b, g, N, C).

    `(out (b, g, r, N, C, e), sums of weights (b, g, r, N, C) or None, the state, the sum of features or None)`.
    """
    reach = fk.new_zeros(1, 1, *fk.shape[2:4], 1) if log is None else log.cumsum(-2)
    into = fk * torch.exp(reach)
    left = fk * torch.exp(reach[..., -1:, :] - reach)
    keep = torch.exp(reach[..., -1, :]).unsqueeze(-1)
    if beta is None:
        fixed, moved = v, None
    else:
        mixed = decayed(fk, fk, log).tril(-1) * beta.unsqueeze(-1)
        lower = mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
        wanted = torch.cat((v, into), -1) * beta.unsqueeze(-1)
        fixed, moved = torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True).split(
            (v.shape[-1], fk.shape[-1]), -1
        )
    states, written, levels = [], [], []
    for n in range(fk.shape[2]):
        states.append(s)
        u = fixed[:, :, n] if moved is None else fixed[:, :, n] - moved[:, :, n] @ s
        written.append(u)
        s = s * keep[:, :, n] + left[:, :, n].mT @ u
        if z is not None:
            levels.append(z)
            z = z * keep[:, :, n, :, 0] + left[:, :, n].sum(-2)
    u = torch.stack(written, 2)
    above = None if log is None else log.unsqueeze(2)
    square = decayed(fq, fk.unsqueeze(2), above)
    reader = fq * torch.exp(reach).unsqueeze(2)
    out = square @ u.unsqueeze(2) + reader @ torch.stack(states, 2).unsqueeze(2)
    if z is None:
        return out, None, s, None
    total = square.sum(-1) + (reader @ torch.stack(levels, 2).unsqueeze(2).unsqueeze(-1)).squeeze(-1)
    return out, total, s, z


def advance(
    fq: Tensor, fk: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None, s: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Tokens of any number: fq (b, h, n, m), fk (b, g, n, m), v (b, g, n, e), log (b or 1, g, n or 1, 1 or m), beta (b, g, n).

    `(out (b, h, n, e), sums of weights (b, h, n) or None, the state, the sum of features or None)`.
    """
    (b, h, n, m), g = fq.shape, fk.shape[1]
    if log is not None and log.shape[2] == 1:
        log = log.expand(-1, -1, n, -1)

    def cut(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, -n % CHUNK)).unflatten(2, (-1, CHUNK))

    rows = cut(fq).view(b, g, h // g, -1, CHUNK, m)
    keys, values = cut(fk), cut(v)
    logs = None if log is None else cut(log)
    betas = None if beta is None else cut(beta.unsqueeze(-1)).squeeze(-1)
    outs, totals = [], []
    for a in range(0, keys.shape[2], GROUP):
        at = slice(a, a + GROUP)
        out, total, s, z = group(
            rows[:, :, :, at],
            keys[:, :, at],
            values[:, :, at],
            None if logs is None else logs[:, :, at],
            None if betas is None else betas[:, :, at],
            s,
            z,
        )
        outs.append(out.flatten(3, 4).flatten(1, 2)[:, :, : n - a * CHUNK])
        if total is not None:
            totals.append(total.flatten(3, 4).flatten(1, 2)[:, :, : n - a * CHUNK])
    return torch.cat(outs, 2), torch.cat(totals, 2) if totals else None, s, z
