"""Attention whose weights depend on positions alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.nn.positions import sinusoids


class PositionalAttention(nn.Module):
    """softmax((P Wq)(P Wk)^T) x Wv, heads side by side, with fixed codes P: one-hot below max_length, or sinusoids.

    x is (B, n, dim), the answer (B, n, dim). With `keep` > 0, weights of lengths with at most so many elements are kept and
    used again while no gradient is asked for and the maps have not changed. (Luca et al., Positional Attention:
    Expressivity and Learnability of Algorithmic Computation, 2024.)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        codes: str = "one_hot",
        *,
        max_length: int = 64,
        code_dim: int = 64,
        keep: int = 0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if codes not in ("one_hot", "sinusoidal"):
            raise ValueError(f"codes must be one_hot or sinusoidal, got {codes!r}")
        self.heads, self.codes, self.max_length, self.keep = heads, codes, max_length, keep
        self.code_dim = max_length if codes == "one_hot" else code_dim
        std = (dim // heads) ** -0.25
        self.query = nn.Parameter(std * torch.randn(heads, self.code_dim, dim // heads))
        self.key = nn.Parameter(std * torch.randn(heads, self.code_dim, dim // heads))
        self.value_proj = nn.Linear(dim, dim, bias=False)
        self.kept: dict[int, tuple[tuple[object, ...], Tensor]] = {}

    def code(self, length: int) -> Tensor:
        """P, (length, code_dim)."""
        if self.codes == "one_hot":
            if length > self.max_length:
                raise ValueError(
                    f"{length} tokens are more than max_length={self.max_length}; use codes='sinusoidal' for any length"
                )
            return torch.eye(self.max_length, dtype=self.query.dtype, device=self.query.device)[:length]
        at = torch.arange(length, device=self.query.device)
        return sinusoids(at, self.code_dim).to(self.query.dtype)

    def weights(self, length: int) -> Tensor:
        """The weights (heads, length, length) of any input of so many tokens."""
        reuse = self.keep >= self.heads * length * length and not torch.is_grad_enabled()
        maps = (self.query, self.key)
        mark = tuple(x for p in maps for x in (p.data_ptr(), p._version, p.dtype, p.device))
        if reuse and length in self.kept and self.kept[length][0] == mark:
            return self.kept[length][1]
        code = self.code(length)
        found = torch.softmax((code @ self.query) @ (code @ self.key).mT, -1)
        if reuse:
            self.kept[length] = (mark, found)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The mixed values of every head, (B, n, dim)."""
        v = self.value_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return (self.weights(x.shape[1]) @ v).transpose(1, 2).flatten(2)


class PositionalBlock(nn.Module):
    """MLP([heads of positional attention; x]) (Luca et al., Positional Attention, 2024)."""

    def __init__(
        self, dim: int, heads: int, codes: str = "one_hot", *, max_length: int = 64, width: int = 2
    ) -> None:
        super().__init__()
        self.attention = PositionalAttention(dim, heads, codes, max_length=max_length)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, width * dim), nn.ReLU(), nn.Linear(width * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, dim) to the same shape."""
        return self.mlp(torch.cat((self.attention(x), x), -1))
