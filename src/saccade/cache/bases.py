"""Bases in which keys and values are easy to quantise; queries and outputs turn with them, so nothing else changes.

Legend: b batch, g key-value heads, h query heads, R = b g rows, n keys, L queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bases:
    """Orthogonal bases of keys (g, d, d) and values (g, e, e), of each key-value head or, where g is 1, of all of them.

    `tau_k` and `tau_v` (g,) bound the magnitude of what is stored.
    """

    k: Tensor
    v: Tensor
    tau_k: Tensor | None = None
    tau_v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the bases."""
        held = (self.k, self.v, self.tau_k, self.tau_v)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (b, g, n, d) and values (b, g, n, e) in their bases, clipped, in float32 or wider."""
        found = []
        for x, basis, tau in ((k, self.k, self.tau_k), (v, self.v, self.tau_v)):
            y = rotated(x.flatten(0, 1), basis).view(x.shape)
            found.append(y if tau is None else y.clamp(-tau.view(1, -1, 1, 1), tau.view(1, -1, 1, 1)))
        return found[0], found[1]


def rotated(x: Tensor, basis: Tensor) -> Tensor:
    """x (R, ..., d), the heads of one sample after another, times the basis (g, d, d) of each head; float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, heads = x.shape[0], basis.shape[0]
    if not x.numel():
        return x.to(wide)
    return (x.to(wide).reshape(rows // heads, heads, -1, x.shape[-1]) @ basis.to(wide)).view(x.shape)


def hadamard(d: int) -> Tensor:
    """The orthogonal Hadamard matrix (d, d) of Sylvester; where d is 2^a m with m odd, it mixes every m-th channel."""
    power = d & -d
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < power:
        made = torch.cat((torch.cat((made, made), 1), torch.cat((made, -made), 1)))
    return torch.kron(made, torch.eye(d // power, dtype=torch.float64)) / math.sqrt(power)


def bit_reversed(d: int) -> Tensor:
    """The order (d,) that reverses the bits of each index; where d is 2^a m with m odd, those of the multiple of m."""
    power = d & -d
    bits = power.bit_length() - 1
    order = [int(f"{n:0{bits}b}"[::-1], 2) if bits else 0 for n in range(power)]
    m = d // power
    return torch.tensor([n * m + rest for n in order for rest in range(m)])


def random_rotation(d: int, seed: int) -> Tensor:
    """An orthogonal matrix (d, d), uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def spectral(covariance: Tensor) -> Tensor:
    """U H P of a covariance (..., d, d): its eigenvectors, smallest first, then Hadamard and bit reversal, (..., d, d).

    What the queries see least comes first, so that the largest keys of a pair of opposed spectra end as an offset that the
    zero of a group takes up. (Zhou et al., OSCAR: Offline Spectral Covariance-Aware Rotation, 2026.)
    """
    d = covariance.shape[-1]
    basis = torch.linalg.eigh(covariance.double()).eigenvectors
    return (basis @ hadamard(d).to(basis.device))[..., bit_reversed(d).to(basis.device)]


def covariance(x: Tensor, there: Tensor) -> Tensor:
    """E[x x^T] of queries or outputs x (b, h, L, d), where `there` (b, g, L), for each of g key-value heads, (g, d, d)."""
    b, g, length = there.shape
    rows = x.double().view(b, g, -1, length, x.shape[-1])
    rows = rows.masked_fill(~there[:, :, None, :, None], 0.0)
    count = there.sum((0, 2)).clamp_min(1) * rows.shape[2]
    return torch.einsum("bgrld,bgrle->gde", rows, rows) / count[:, None, None]
