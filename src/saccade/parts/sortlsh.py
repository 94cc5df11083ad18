"""Pairs found by sorting hashes: a query reads the keys whose hashes stand next to its own, and a sample of the rest.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, P planes, V levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.base import arg
from saccade.parts.pair import Context
from saccade.parts.pattern import shuffled
from saccade.parts.select import Select
from saccade.parts.selection import Sampled


def gray_hash(x: Tensor, planes: Tensor) -> Tensor:
    """The place in Gray order of the signs of x (..., d) before planes (P, d): neighbours differ in one sign."""
    signs = (x.to(planes.dtype) @ planes.T > 0).long()
    digits = signs.cumsum(-1) % 2
    return (digits << torch.arange(len(planes) - 1, -1, -1, device=x.device)).sum(-1)


@dataclass(frozen=True)
class SortLSH(Select):
    """Queries and keys sorted by their hash meet in buckets of `block` keys; `samples` keys stand for those outside.

    With n keys, b of them in a query's bucket, m of the others sampled: each of these m weighs (n - b) / m, so that the
    denominator is unbiased; a sampled key inside the bucket counts once. Without a limit that looks back, the r-th query
    and the r-th key in hash order share a bucket.

    Under one, tokens split into runs of `base` 2^l. A query reads its run of `base` tokens exactly, and for every l
    where its run is the right one of two, the left run by hashes: its bucket is where its own hash would stand among those
    keys. Neither later queries nor later keys move it. (Han et al., HyperAttention: Long-context Attention in Near-Linear
    Time, 2023.)
    """

    block: int = arg(64, at_least=1)
    samples: int = arg(64, at_least=0)
    base: int = arg(256, at_least=1)
    planes: int = arg(16, at_least=1)
    seed: int = arg(0, at_least=0)

    name = "sort_lsh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base % self.block:
            raise MechanismError(
                f"sort_lsh: base must be a multiple of block={self.block}, got {self.base}; "
                f"use {-(-self.base // self.block) * self.block}"
            )
        if self.planes > 30:
            raise MechanismError(f"sort_lsh: planes must be at most 30, got {self.planes}")

    def levels(self, keys: int) -> list[int]:
        """Tokens of the runs that have a run to their left, level by level."""
        found, run = [], self.base
        while run < keys:
            found.append(run)
            run *= 2
        return found

    def flops(self, rows: int, keys: int, head_dim: int, looks_back: bool) -> int:
        return 2 * (rows + keys) * head_dim * self.planes

    @torch.no_grad()
    def choose(self, c: Context) -> Sampled:
        generator = torch.Generator().manual_seed(self.seed)
        wide = torch.promote_types(c.q.dtype, torch.float32)
        planes = torch.randn(self.planes, c.q.shape[-1], generator=generator, dtype=torch.float64)
        q, k = (gray_hash(x, planes.to(c.q.device, wide)) for x in (c.q, c.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        levels = self._runs(c, q, k) if c.looks_back else [self._whole(c, q, k)]
        return Sampled(*(torch.stack(x, -2) for x in zip(*levels, strict=True)))

    def _whole(self, c: Context, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """One node of all keys."""
        keys, ends, heads = k.shape[-1], c.key_ends, q.shape[1]
        last = 1 << self.planes
        if c.valid is not None:
            k = k.masked_fill(~c.valid[:, None], last)
        rows = torch.full_like(ends, q.shape[-1])
        if c.query_valid is not None:
            q, rows = q.masked_fill(~c.query_valid[:, None], last), ends
        place = torch.div(
            _ranks(q) * ends[:, None, None], rows.clamp_min(1)[:, None, None], rounding_mode="floor"
        )
        q_bucket, k_bucket = place // self.block, _ranks(k) // self.block
        j = torch.arange(keys, device=k.device)
        head = torch.arange(heads, device=k.device)[:, None]
        sampled = torch.stack([self._sample(j, head, n) & (j < n) for n in ends.tolist()])
        there = j < ends[:, None]
        k_node = torch.where(there, 0, -2)
        q_node = torch.zeros(1, q.shape[-1], dtype=torch.long, device=k.device).expand(len(k_node), -1)
        weight = self._log_weight(q_bucket, k_bucket, sampled, there[:, None], ends[:, None, None])
        return q_node, k_node, q_bucket, k_bucket, sampled, weight

    def _runs(self, c: Context, q: Tensor, k: Tensor) -> list[tuple[Tensor, ...]]:
        """The own run, and the run to the left of every level."""
        i, j, heads = c.i, c.j, q.shape[1]
        b = q.shape[0]
        q_own, k_own = (x // self.base for x in (i, j))
        k_own = k_own.expand(len(q_own), -1)
        never = torch.zeros(1, heads, k.shape[-1], dtype=torch.bool, device=k.device)
        found: list[tuple[Tensor, ...]] = [
            (
                q_own,
                k_own,
                q_own[:, None].expand(b, heads, -1),
                k_own[:, None].expand(b, heads, -1),
                never,
                torch.zeros(q.shape, dtype=torch.float64, device=q.device),
            )
        ]
        head = torch.arange(heads, device=k.device)[:, None]
        big = 1 << self.planes
        for run in self.levels(int(c.start + k.shape[-1])):
            q_run, k_run = i // run, j // run
            q_node = torch.where(q_run % 2 == 1, q_run, -1)
            k_node = torch.where(k_run % 2 == 0, k_run + 1, -2).expand(len(q_run), -1)
            coded, order = (k + k_run[:, None] * big).sort(dim=-1, stable=True)
            rank = torch.empty_like(order).scatter_(
                -1, order, torch.arange(k.shape[-1], device=k.device).expand_as(order)
            )
            wanted = (q + (q_run[:, None] - 1) * big).contiguous()
            low, high = (torch.searchsorted(coded, wanted, right=side) for side in (False, True))
            place = (low + high) // 2 + c.start
            left = (q_run[:, None] - 1) * run
            buckets = -(-run // self.block)
            inside = (place - left).clamp(0, run - 1) // self.block
            q_bucket = (q_run[:, None] - 1) * buckets + inside
            k_bucket = k_run[:, None] * buckets + ((rank + c.start) % run) // self.block
            sampled = self._sample(j[0] % run, k_run[0] * heads + head, run)[None]
            weight = self._log_weight(q_bucket, k_bucket, sampled, torch.ones_like(sampled), run)
            found.append((q_node, k_node, q_bucket, k_bucket, sampled, weight))
        return found

    def _sample(self, place: Tensor, key: Tensor, count: int) -> Tensor:
        """Which of `count` places are sampled, by a shuffle of its own for every key: (h, S)."""
        if not count:
            return torch.zeros(
                torch.broadcast_shapes(place.shape, key.shape), dtype=torch.bool, device=place.device
            )
        place, key = torch.broadcast_tensors(place.clamp(max=count - 1), key)
        return shuffled(place, key, count, self.seed) < self.samples

    def _log_weight(self, q: Tensor, k: Tensor, sampled: Tensor, valid: Tensor, keys: Tensor | int) -> Tensor:
        """log of keys outside of each query's bucket over sampled keys outside of it, 0 where there are none; (b, h, L)."""
        count = int(max(q.max(), k.max())) + 1 if q.numel() and k.numel() else 1
        sizes = torch.zeros(*k.shape[:2], count, dtype=torch.long, device=k.device)
        drawn = torch.zeros_like(sizes).scatter_add_(-1, k, sampled.long().expand_as(k))
        sizes = sizes.scatter_add_(-1, k, valid.long().expand_as(k))
        total = min(self.samples, keys) if isinstance(keys, int) else keys.clamp(max=self.samples)
        at = q.clamp(min=0)
        rest, seen = keys - sizes.gather(-1, at), total - drawn.gather(-1, at)
        return torch.where(
            (seen > 0) & (rest > 0), (rest.clamp_min(1).double() / seen.clamp_min(1)).log(), 0.0
        )


def _ranks(codes: Tensor) -> Tensor:
    """The place of each code of (..., n) among all, the earlier of equals first."""
    return codes.argsort(dim=-1, stable=True).argsort(dim=-1)
