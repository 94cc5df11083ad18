"""Blocks that end in a landmark: its weight is shared out inside the block, and its key says which block to fetch.

Legend: b batch, h query heads, g key-value heads, U blocks of `block` keys, the last of each its landmark; Q x K one tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.parts.base import arg
from saccade.parts.normalizer import Normalizer, Softmax
from saccade.parts.proxy import Proxy
from saccade.parts.score import Score, grouped_matmul
from saccade.parts.tokens import Rope

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


@dataclass(frozen=True)
class GroupedSoftmax(Normalizer):
    """A softmax over the own block's tokens and earlier blocks' landmarks; each landmark's weight goes to its block.

    Inside an earlier block the weight is shared out by a softmax over its tokens, so that weights sum to one and landmarks
    get none. A landmark does not read itself; one whose block has no token to read counts for nothing. (Mohtashami and
    Jaggi, Landmark Attention: Random-Access Infinite Context Length for Transformers, 2023.)
    """

    block: int = arg(64, at_least=2)

    name = "grouped_softmax"
    needs = frozenset({"key order"})
    gives = frozenset({"positive"})
    held = (12, 15)

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        assert t is not None
        unit = torch.div(t.j, self.block, rounding_mode="floor")
        landmark = t.j % self.block == self.block - 1
        own = unit == torch.div(t.i, self.block, rounding_mode="floor")
        at = unit[0, 0, 0] - unit.min()
        count = int(at.max()) + 1

        def of_block(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], count).index_add(-1, at, x).index_select(-1, at)

        inside = s.masked_fill(own | landmark, -torch.inf)
        top = torch.full((*s.shape[:-1], count), -torch.inf, dtype=s.dtype, device=s.device)
        top = top.scatter_reduce(-1, at.expand(s.shape), inside.detach(), "amax").index_select(-1, at)
        e = (inside - top.masked_fill(torch.isneginf(top), 0.0)).exp()
        total = of_block(e)
        closed = (~own & ~landmark) | (own & landmark) | (landmark & (total == 0))
        w, _ = Softmax().normalize(s.masked_fill(closed, -torch.inf))
        shares = e / total.masked_fill(total == 0, 1.0)
        return torch.where(own, w, of_block(w.masked_fill(own, 0.0)) * shares), None


@dataclass(frozen=True)
class StingyRope(Score):
    """q.k / sqrt(d) with rope, where a block `far` or more blocks back is taken to stand `far` blocks back.

    So no distance is longer than far + 1 blocks, whatever the length: a simpler form of the stingy position mapping of
    Mohtashami and Jaggi, 2023, which moves fetched blocks next to each other.
    """

    block: int = arg(64, at_least=2)
    far: int = arg(4, at_least=1)
    base: float = arg(10000.0, above=0.0)

    name = "stingy_rope"

    def turned(self, q: Tensor, i: Tensor, k: Tensor, j: Tensor, c: Context) -> tuple[Tensor, ...]:
        """q and k at their places, then q `far` blocks after the first and k in the first; i, j (b or 1, n)."""
        rope = Rope(self.base)
        q = q * q.shape[-1] ** -0.5
        return (
            rope.map(q, i, "q", c),
            rope.map(k, j, "k", c),
            rope.map(q, i % self.block + self.far * self.block, "q", c),
            rope.map(k, j % self.block, "k", c),
        )

    def is_near(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the pairs of positions i and j stand at their true distance."""
        return torch.div(i, self.block, rounding_mode="floor") < self.far + torch.div(
            j, self.block, rounding_mode="floor"
        )

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        q, k, far_q, far_k = self.turned(c.q, c.i, c.k, c.j, c)
        return torch.cat((q, far_q), -1), torch.cat((k, far_k), -1)

    def tile(self, t: Tile) -> Tensor:
        (q, far_q), (k, far_k) = t.q.chunk(2, -1), t.k.chunk(2, -1)
        near, far = grouped_matmul(q, k.mT), grouped_matmul(far_q, far_k.mT)
        return torch.where(self.is_near(t.i, t.j), near, far)

    def pair_flops(self, head_dim: int) -> int:
        return 4 * head_dim

    def temporaries(self, head_dim: int) -> int:
        return 2


@dataclass(frozen=True)
class LandmarkKey(Proxy):
    """The logit of a block's last key, its landmark; with `far` at the distances of `stingy_rope`.

    (Mohtashami and Jaggi, Landmark Attention, 2023.)
    """

    far: int | None = arg(None, at_least=1)
    base: float = arg(10000.0, above=0.0)

    name = "landmark_key"

    def flops(self, head_dim: int) -> int:
        return 2 * head_dim if self.far is None else 4 * head_dim

    def keys(self, c: Context, size: int) -> Tensor:
        wide = torch.promote_types(c.k.dtype, torch.float32)
        return c.k.index_select(2, self._places(c, size)).to(wide)

    def _places(self, c: Context, size: int) -> Tensor:
        ends = torch.arange(size - 1, c.k.shape[2] + size - 1, size, device=c.k.device)
        return ends.clamp(max=c.k.shape[2] - 1)  # a block without its landmark is the last, and no candidate

    def prepare(self, c: Context, size: int, rows: int) -> Any:
        if self.far is None:
            return super().prepare(c, size, rows)
        score, places = StingyRope(size, self.far, self.base), self._places(c, size)
        j = c.j.index_select(1, places)
        q, k, far_q, far_k = score.turned(c.q, c.i, c.k.index_select(2, places), j, c)
        q, far_q = (self.queries(replace(c, q=x), rows) for x in (q, far_q))
        last = torch.arange(rows, c.q.shape[2] + rows, rows, device=q.device).clamp(max=c.q.shape[2]) - 1
        near = score.is_near(c.i.index_select(1, last)[:, None, :, None], j[:, None, None])
        return q, k, far_q, far_k, near

    def scores(self, ready: Any, cut: slice, reach: int) -> Tensor:
        if self.far is None:
            return super().scores(ready, cut, reach)
        q, k, far_q, far_k, near = ready
        true, moved = (
            grouped_matmul(a[:, :, cut], b[:, :, :reach].mT.to(a.dtype)) for a, b in ((q, k), (far_q, far_k))
        )
        return torch.where(near[:, :, cut, :reach], true, moved)
