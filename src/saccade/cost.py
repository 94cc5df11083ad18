"""Sizes of a request and the cost of an answer, in formulas that counters can check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: queries (batch, heads, length, head_dim) against keys (batch, kv_heads, keys, head_dim)."""

    batch: int
    heads: int
    length: int
    head_dim: int
    kv_heads: int = 0
    keys: int = 0
    value_dim: int = 0

    def __post_init__(self) -> None:
        for name, fallback in (("kv_heads", self.heads), ("keys", self.length), ("value_dim", self.head_dim)):
            if not getattr(self, name):
                object.__setattr__(self, name, fallback)

    @classmethod
    def of(cls, shape: Shape | Sequence[int]) -> Shape:
        """A Shape from one, or from (batch, heads, length, head_dim)."""
        if isinstance(shape, Shape):
            return shape
        if len(shape) != 4:
            raise ValueError(
                f"a shape is saccade.Shape(...) or (batch, heads, length, head_dim), got {tuple(shape)}"
            )
        return cls(*shape)

    def __str__(self) -> str:
        q = f"q ({self.batch}, {self.heads}, {self.length}, {self.head_dim})"
        return (
            f"{q}, k ({self.batch}, {self.kv_heads}, {self.keys}, {self.head_dim}), v (..., {self.value_dim})"
        )


@dataclass(frozen=True)
class Request:
    """All that a plan depends on besides the mechanism."""

    shape: Shape
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad: bool = False
    lse: bool = False
    masked: bool = False
    ragged: bool = False
    decoding: bool = False

    @property
    def item(self) -> int:
        """Bytes of one input number."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of one statistic."""
        return max(4, self.dtype.itemsize)

    @property
    def shifted(self) -> bool:
        """True when queries and keys differ in number, so that causality is aligned at the end."""
        return self.shape.length != self.shape.keys

    def tensor_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of q, k, v and the output."""
        s, n = self.shape, self.item
        return (
            s.batch * s.heads * s.length * s.head_dim * n,
            s.batch * s.kv_heads * s.keys * s.head_dim * n,
            s.batch * s.kv_heads * s.keys * s.value_dim * n,
            s.batch * s.heads * s.length * s.value_dim * n,
        )


@dataclass(frozen=True)
class Cost:
    """What a call costs: matrix FLOPs (two a multiply-add), bytes moved, peak bytes besides the inputs, launches."""

    flops: int
    bytes: int
    peak: int
    launches: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.peak, other.peak),
            self.launches + other.launches,
        )


RATES = {"cpu": (200e9, 12e9, 6e-6), "cuda": (300e12, 3e12, 8e-6)}


def seconds(cost: Cost, device: str, dtype: torch.dtype, efficiency: float) -> float:
    """A rough time, to rank candidates by: the larger of arithmetic and traffic, and the launches."""
    flops, traffic, launch = RATES.get(device, RATES["cuda"])
    if device != "cpu" and dtype.itemsize > 2:
        flops /= 8
    return max(cost.flops / (flops * efficiency), cost.bytes / traffic) + cost.launches * launch
