"""Damped moving averages of every channel: a diagonal linear state, by FFT over a whole input or from token to token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DampedEMA(nn.Module):
    """h_t = alpha (beta x_t) + (1 - alpha delta) h_{t-1}, y_t = eta.h_t, for `rank` averages h of each channel of x (B, n, dim).

    alpha and delta are sigmoids of what is learned; at first the averages reach back 4 to `longest` tokens, in equal ratios.
    A whole input is one convolution, by FFT in O(n log n), where what stands later reaches earlier rows as rounding, and
    NaN as NaN. (Ma et al., Mega: Moving Average Equipped Gated Attention, 2023.)

    >>> DampedEMA(8)(torch.zeros(1, 10, 8)).shape
    torch.Size([1, 10, 8])
    """

    def __init__(self, dim: int, rank: int = 16, *, longest: float = 512.0) -> None:
        super().__init__()
        if dim < 1 or rank < 1 or longest <= 4:
            raise ValueError(
                f"dim and rank must be at least 1 and longest above 4, got dim={dim}, rank={rank}, longest={longest:g}"
            )
        forget = 2 * torch.exp(-torch.linspace(math.log(4), math.log(longest), rank))
        self.alpha = nn.Parameter(0.2 * torch.randn(dim, rank))
        self.delta = nn.Parameter(torch.logit(forget.expand(dim, -1)))
        self.beta = nn.Parameter(torch.randn(dim, rank))
        self.eta = nn.Parameter((4 * forget / rank).sqrt() * torch.randn(dim, rank))

    def init_state(self, batch: int) -> Tensor:
        """The averages before the first token, (B, dim, rank)."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        return torch.zeros(batch, *self.alpha.shape, dtype=wide, device=self.alpha.device)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, n, dim) of x (B, n, dim)."""
        return self._convolved(x, *self._rates(x.shape[1])).to(x.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens x (B, n, dim) and the averages before them, to y (B, n, dim) and the averages after."""
        if state.shape != (len(x), *self.alpha.shape):
            raise ValueError(
                f"the averages must be {(len(x), *self.alpha.shape)}, got {tuple(state.shape)}; start from init_state(...)"
            )
        powers, write = self._rates(x.shape[1] + 1)
        y = self._convolved(x, powers[..., :-1], write)
        y = y + torch.einsum("bdr,dr,drn->bnd", state, self.eta.to(y.dtype), powers[..., 1:])
        new = torch.einsum("bnd,drn->bdr", x.to(y.dtype), powers[..., :-1].flip(-1))
        return y.to(x.dtype), powers[..., -1] * state + write * new

    def _rates(self, n: int) -> tuple[Tensor, Tensor]:
        """(1 - alpha delta)^t for t < n, (dim, rank, n), and alpha beta, float32 or wider."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        alpha = self.alpha.to(wide).sigmoid()
        keep = 1 - alpha * self.delta.to(wide).sigmoid()
        return keep.unsqueeze(-1).pow(torch.arange(n, device=keep.device)), alpha * self.beta.to(wide)

    def _convolved(self, x: Tensor, powers: Tensor, write: Tensor) -> Tensor:
        """y from averages that start at zero."""
        n = x.shape[1]
        kernel = torch.einsum("drn,dr->nd", powers, write * self.eta.to(write.dtype))
        x = x.to(kernel.dtype)
        if n < 2:
            return x * kernel
        spectrum = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(kernel, 2 * n, dim=0)
        return torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n]
