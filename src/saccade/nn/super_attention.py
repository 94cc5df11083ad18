"""Attention over the input itself, with values that a learned matrix aligns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import Attention


class SuperAttention(nn.Module):
    """softmax(x W_q x^T / sqrt(d)) A x W_o with one head: keys are the input, values the input mixed over positions by A.

    A (length, length) is learned; shorter input uses its first rows and columns, longer input is refused. Under a causal
    mechanism A must be `lower` triangular, since it mixes positions. (Hosseini and Hosseini, You Need to Pay Better
    Attention, 2024.)

    >>> SuperAttention(16, length=8)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self, dim: int, length: int, mechanism: str | Mechanism = "full", *, lower: bool = False
    ) -> None:
        super().__init__()
        m = parse(mechanism)
        if m.causal and not lower:
            raise NotSupported(
                f"the values of a position hold later ones, so {m} would read the future; give lower=True for a "
                "triangular matrix"
            )
        self.lower = lower
        self.attention = Attention(dim, 1, m, borrows=True)
        self.align = nn.Parameter(torch.eye(length) + torch.randn(length, length) * 0.1 / length**0.5)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """Tokens x (B, n, dim) to (B, n, dim); later tokens than `key_lengths` (B,) are padding."""
        n = x.shape[1]
        if n > len(self.align):
            raise NotSupported(
                f"the matrix aligns at most {len(self.align)} tokens, got {n}; make it with length={n}"
            )
        align = self.align[:n, :n].tril() if self.lower else self.align[:n, :n]
        known = x
        if key_lengths is not None:
            gone = torch.arange(n, device=x.device) >= key_lengths[:, None]
            known = x.masked_fill(gone[..., None], 0)
        out = self.attention(x, kv=(x[:, None], (align @ known)[:, None]), key_lengths=key_lengths)
        assert isinstance(out, Tensor)
        return out
