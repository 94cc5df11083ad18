"""Keys chosen by a low-rank estimate of the attention map, which learns from the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.blockmap import block_map
from saccade.parts.proxy import Proxy
from saccade.parts.score import grouped_matmul
from saccade.parts.select import TopKeys

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class LowRankMap(Proxy):
    """a W with a = softmax(q.(V k) / sqrt(d)) over `rank` mixtures V k of all keys, entries of a below `threshold` dropped.

    V and W are learned, (rank, length) a key-value head, so the length is fixed: longer input is refused, shorter input
    uses the first columns. The loss `connectivity` is the divergence of softmax(a W) from the layer's dense map.
    (Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, 2023.)
    """

    rank: int = arg(16, at_least=1)
    length: int = arg(64, at_least=1)
    threshold: float = arg(0.02, at_least=0.0)

    name = "low_rank_map"
    causal = "never"
    relative = "top_keys(16) or moba"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        shape = (sizes.kv_heads, self.rank, self.length)
        return {"map_down": Weight(shape, std=self.length**-0.5), "map_up": Weight(shape, std=1.0)}

    def flops(self, head_dim: int) -> int:
        return 2 * self.rank

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 4 * self.rank * sizes.head_dim

    def coefficients(self, c: Context) -> Tensor:
        """How much of each mixture a query asks for, (b, h, L, rank), float32 or wider."""
        n = c.k.shape[2]
        if n > self.length:
            raise NotSupported(
                f"low_rank_map was made for at most {self.length} tokens, got {n}; make it with length={n} or use {self.relative}"
            )
        wide = torch.promote_types(c.q.dtype, torch.float32)
        k = c.k if c.valid is None else c.k.masked_fill(~c.valid[:, None, :, None], 0)
        mixed = c.params["map_down"][..., :n].to(wide) @ k.to(wide)
        s = grouped_matmul(c.q.to(wide) * c.q.shape[-1] ** -0.5, mixed.transpose(-1, -2))
        a = torch.softmax(s, -1)
        return a.masked_fill(a < self.threshold, 0.0)

    def prepare(self, c: Context, size: int, rows: int) -> tuple[Tensor, Tensor]:
        if size != 1 or rows != 1:
            raise NotSupported(
                f"low_rank_map scores single keys for single queries, not blocks of {rows} x {size}; use it in top_keys"
            )
        a = self.coefficients(c)
        return a, c.params["map_up"][..., : c.k.shape[2]].to(a.dtype)

    def scores(self, ready: tuple[Tensor, Tensor], cut: slice, reach: int) -> Tensor:
        a, up = ready
        return grouped_matmul(a[:, :, cut], up[None, :, :, :reach].expand(a.shape[0], -1, -1, -1))

    def losses(self, c: Context) -> dict[str, Tensor]:
        s = self.scores(self.prepare(c, 1, 1), slice(None), c.k.shape[2])
        if c.valid is not None:
            s = s.masked_fill(~c.valid[:, None, None], -torch.inf)
        with torch.no_grad():
            truth = block_map(c, 1).mass
        log = torch.log_softmax(s, -1).masked_fill(truth == 0, 0.0)
        rows = (torch.xlogy(truth, truth) - truth * log).sum(-1)
        if c.query_valid is not None:
            return {"connectivity": rows.transpose(1, 2)[c.query_valid].mean()}
        return {"connectivity": rows.mean()}


@system("sparsifiner", ref="S277")
def sparsifiner(top: int = 16, rank: int = 16, length: int = 64, threshold: float = 0.02) -> Pairwise:
    """Softmax over the `top` keys of each query by a low-rank estimate of its attention map (Wei et al., Sparsifiner, 2023).

    For a fixed `length`, bidirectional; its causal relatives choose by keys alone, as `causal + top_keys(16)`.
    """
    return Pairwise(pairs=TopKeys(top, LowRankMap(rank, length, threshold)))
