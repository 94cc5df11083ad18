"""Attention over channels x time whose content, time and channel terms are separate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise, system
from saccade.parts.algebra import Mask, Span
from saccade.parts.base import Side, Sizes, Weight, arg
from saccade.parts.score import Score, grouped_matmul
from saccade.parts.tokens import rope_rates

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


def columns(name: str, grid: tuple[int, ...] | None) -> int:
    """Cells in a row of a two-axis grid. Raises NotSupported where there is none."""
    if grid is None or len(grid) != 2:
        raise NotSupported(
            f"{name} reads tokens as time x channels: give the sizes, attend(..., grid=(times, channels)); got {grid}"
        )
    return grid[1]


@dataclass(frozen=True)
class PastRows(Mask):
    """On a grid of rows, all cells of the own row and of earlier rows: causal in the first axis alone."""

    grid: tuple[int, ...] | None = arg(None, at_least=1)

    name = "past_rows"
    joins = "and"

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        width = columns(self.name, self.grid)
        return torch.div(j, width, rounding_mode="floor") <= torch.div(i, width, rounding_mode="floor")

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        width = columns(self.name, self.grid)
        end = min(keys, -(-i1 // width) * width)
        return [(0, end)] if end > 0 else []


@dataclass(frozen=True)
class MultiVariate(Score):
    """((q + u).k [|t - t'| < window] + (q + v).Wt r(t - t') + (q + z).Wc r(|c - c'|)) / sqrt(d), r sinusoids.

    Outside the window a pair keeps its time and channel terms. The last two are products with a table of offsets, looked up
    for each pair. (Carzaniga et al., A Foundation Model with Multi-Variate Parallel Attention, 2025.)
    """

    window: int = arg(10, at_least=1)
    grid: tuple[int, ...] | None = arg(None, at_least=1)

    name = "multivariate"
    breaks = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        bias, map_ = (sizes.heads, sizes.head_dim), (sizes.kv_heads, sizes.head_dim, sizes.head_dim)
        return {f"{n}_bias": Weight(bias, init="zeros") for n in ("content", "time", "channel")} | {
            f"{n}_map": Weight(map_, std=sizes.head_dim**-0.5) for n in ("time", "channel")
        }

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        width = columns(self.name, self.grid)
        return 2 * sizes.head_dim * (2 * -(-keys // width) - 1 + width)

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        return self._query(c, "content"), c.k

    def _query(self, c: Context, term: str) -> Tensor:
        bias = c.params[f"{term}_bias"].to(c.q.dtype)[:, None]
        return (c.q + bias) / math.sqrt(c.q.shape[-1])

    def extras(self, c: Context) -> dict[str, tuple[Side, Tensor]]:
        width, d = columns(self.name, self.grid), c.q.shape[-1]
        if d % 2:
            raise NotSupported(f"{self.name} looks up sinusoids: head_dim must be even, got {d}")
        times = -(-(c.start + c.k.shape[2]) // width)
        offsets = {"time": torch.arange(1 - times, times), "channel": torch.arange(width)}
        found: dict[str, tuple[Side, Tensor]] = {}
        for term, offset in offsets.items():
            angle = offset.to(c.q.device).double()[:, None] * rope_rates(10000.0, d, c.q.device)
            table = torch.cat((angle.sin(), angle.cos()), -1).to(c.q.dtype)
            keys = table @ c.params[f"{term}_map"].to(c.q.dtype)
            found[f"{term}_terms"] = (
                "q",
                grouped_matmul(self._query(c, term), keys.mT[None].expand(len(c.q), -1, -1, -1)),
            )
        return found

    def tile(self, t: Tile) -> Tensor:
        width = columns(self.name, self.grid)
        s = super().tile(t)
        time, channel = t.streams["time_terms"].to(s.dtype), t.streams["channel_terms"].to(s.dtype)
        back = torch.div(t.i, width, rounding_mode="floor") - torch.div(t.j, width, rounding_mode="floor")
        aside = (t.i % width - t.j % width).abs()
        last = time.shape[-1] // 2
        at = (back.clamp(-last, last) + last).expand(s.shape)
        s = torch.where(back.abs() < self.window, s, 0.0)
        return s + time.gather(-1, at) + channel.gather(-1, aside.expand(s.shape))

    def temporaries(self, head_dim: int) -> int:
        return 2


@system("mvpa", ref="S290")
def mvpa(window: int = 10, grid: tuple[int, ...] | None = None) -> Pairwise:
    """One softmax over all channels of this time and earlier ones; content is compared only within `window` steps.

    Tokens are the cells of a grid of times x channels, row by row; `sc.nn.MVPFormer` predicts the next time. Channels
    differ by |c - c'|, so their order matters. (Carzaniga et al., A Foundation Model with Multi-Variate Parallel
    Attention, 2025.)
    """
    return Pairwise(pairs=PastRows(grid), score=MultiVariate(window, grid))
