"""A memory of keys and values from earlier tokens, and who leaves it when it is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


class Eviction:
    """Ranks the keys of a memory for each head: the lowest rank leaves first, of equals the older."""

    reads: ClassVar[bool] = False  # whether ranks follow from what queries read

    def enter(self, k: Tensor, positions: Tensor) -> Tensor:
        """Ranks (B, H, n), float32, of new keys (B, H, n, D) at positions (n,)."""
        raise NotImplementedError

    def after(self, ranks: Tensor, weights: Tensor, at: Tensor) -> Tensor:
        """Ranks (B, H, S) once queries at positions `at` (L,) have read with weights (B, H, L, S)."""
        return ranks


@dataclass(frozen=True)
class Fifo(Eviction):
    """First in, first out: the oldest key leaves."""

    def enter(self, k: Tensor, positions: Tensor) -> Tensor:
        return positions.float().expand(k.shape[:3])


@dataclass(frozen=True)
class LeastRecent(Eviction):
    """The key that was not attended for the longest time leaves; a weight of `least` or more attends, and so does arrival.

    (Yang and Hua, Attendre: Wait To Attend By Retrieval With Evicted Queries, 2024: LRA.)
    """

    least: float = 0.1

    reads = True

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"least_recent: least is a weight above 0 and up to 1, got {self.least:g}")

    def enter(self, k: Tensor, positions: Tensor) -> Tensor:
        return positions.float().expand(k.shape[:3])

    def after(self, ranks: Tensor, weights: Tensor, at: Tensor) -> Tensor:
        times = at.float()[:, None].expand_as(weights).masked_fill(weights < self.least, -torch.inf)
        return torch.cat((times, ranks.unsqueeze(2)), 2).amax(2)


@dataclass(frozen=True)
class LeastFrequent(Eviction):
    """The key that all queries so far gave the least weight in sum leaves (Yang and Hua, Attendre, 2024: LFA)."""

    reads = True

    def enter(self, k: Tensor, positions: Tensor) -> Tensor:
        return torch.zeros(k.shape[:3], device=k.device)

    def after(self, ranks: Tensor, weights: Tensor, at: Tensor) -> Tensor:
        return ranks + weights.float().sum(2)


@dataclass(frozen=True)
class KeyValueMemory:
    """Keys (B, H, S, D) and values (B, H, S, E) in order of age, where they stood and how they rank (B, H, S).

    `length` counts all tokens that came, those that left included.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    ranks: Tensor
    length: int = 0

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> KeyValueMemory:
        """A memory for keys and values like these, (B, H, any, D) and (B, H, any, E)."""
        positions = torch.zeros(*k.shape[:2], 0, dtype=torch.long, device=k.device)
        return cls(k[:, :, :0].detach(), v[:, :, :0].detach(), positions, positions.float())

    @property
    def size(self) -> int:
        """Keys that are held."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.positions, self.ranks))

    def append(self, k: Tensor, v: Tensor, policy: Eviction) -> KeyValueMemory:
        """The memory with new keys and values at its end."""
        at = torch.arange(self.length, self.length + k.shape[2], device=k.device)
        return KeyValueMemory(
            torch.cat((self.k, k), 2),
            torch.cat((self.v, v), 2),
            torch.cat((self.positions, at.expand(k.shape[:3])), 2),
            torch.cat((self.ranks, policy.enter(k.detach(), at)), 2),
            self.length + k.shape[2],
        )

    def read(self, weights: Tensor, at: Tensor, policy: Eviction) -> KeyValueMemory:
        """The memory once queries at positions `at` (L,) have read it with weights (B, H, L, S)."""
        return replace(self, ranks=policy.after(self.ranks, weights.detach(), at))

    def keep(self, size: int) -> KeyValueMemory:
        """The memory without all but the `size` keys of each head that rank highest."""
        gone = self.size - size
        if gone <= 0:
            return self
        kept = self.ranks.sort(dim=-1, stable=True).indices[..., gone:].sort(-1).values
        k, v = (x.gather(2, kept.unsqueeze(-1).expand(*kept.shape, x.shape[-1])) for x in (self.k, self.v))
        return replace(
            self, k=k, v=v, positions=self.positions.gather(2, kept), ranks=self.ranks.gather(2, kept)
        )


def pieces(start: int, count: int, size: int) -> Iterator[slice]:
    """`count` tokens, the first at position `start`, cut where a position is a multiple of `size`."""
    at = 0
    while at < count:
        end = min(count, at + size - (start + at) % size)
        yield slice(at, end)
        at = end
