"""Which pairs exist by content. A selection is a value: it can be kept, replayed and frozen in tests.

Legend: b batch, h query heads, L queries, S keys, T choices a query, C buckets, w bucket width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.parts.base import Part, Sizes, Stream, arg
from saccade.parts.mask import Pairs
from saccade.parts.score import grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context


ROWS = 1024


@dataclass(frozen=True)
class Blocks:
    """Chosen key blocks of `size` tokens: index and valid are (b, h, N, T) for N blocks of `rows` queries.

    One row and one token are blocks as well. A block chosen twice counts once.
    """

    index: Tensor
    valid: Tensor
    size: int
    rows: int = 1

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        """Boolean (b, h, Q, K) for the rows and the key indices `cols`."""
        start, stop, _ = rows.indices(self.index.shape[2] * self.rows)
        first, last = start // self.rows, -(-stop // self.rows)
        index, valid = self.index[:, :, first:last], self.valid[:, :, first:last]
        blocks = int(cols.max()) // self.size + 1 if cols.numel() else 1
        count = max(blocks, int(index.max()) + 1 if index.numel() else 1)
        table = torch.zeros((*index.shape[:3], count), dtype=torch.uint8, device=j.device)
        table.scatter_reduce_(-1, index, valid.to(torch.uint8), "amax")
        kept = table.index_select(-1, cols // self.size).bool()
        owner = torch.arange(start, stop, device=j.device) // self.rows - first
        return kept if self.rows == 1 else kept.index_select(2, owner)


@dataclass(frozen=True)
class Spans:
    """One key interval [lo, hi] for every query: both (b, h, L)."""

    lo: Tensor
    hi: Tensor

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        return (j >= self.lo[:, :, rows, None]) & (j <= self.hi[:, :, rows, None])


@dataclass(frozen=True)
class Labels:
    """Pairs exist where the labels of query (b, h, L) and key (b, h, S) agree."""

    q: Tensor
    k: Tensor

    def exist(self, rows: slice, j: Tensor, cols: Tensor) -> Tensor:
        return self.q[:, :, rows, None] == self.k[:, :, None].index_select(-1, cols)


@dataclass(frozen=True)
class Buckets:
    """Token indices of every bucket, q (b, h, C, wq) and k (b, h, C, wk), and which of them count."""

    q: Tensor
    k: Tensor
    q_valid: Tensor
    k_valid: Tensor


Selection = Blocks | Spans | Labels | Buckets


class Select(Pairs):
    """A choice of pairs by content."""

    joins = "or"
    leaks: ClassVar[bool] = False

    def choose(self, c: Context) -> Selection:
        """The selection for the queries and keys of `c`."""
        raise NotImplementedError


class Proxy(Part):
    """A cheap score of a query for a block of keys."""

    kind = "proxy"

    def keys(self, c: Context, size: int) -> Tensor:
        """One vector a block, (b, g, blocks, d)."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanKey(Proxy):
    """The query times the mean of the block's keys; padding does not count."""

    name = "mean_key"

    def keys(self, c: Context, size: int) -> Tensor:
        k = c.k
        short = -k.shape[2] % size
        wide = torch.promote_types(k.dtype, torch.float32)
        if c.valid is None:
            filled = torch.nn.functional.pad(k, (0, 0, 0, short)) if short else k
            sums = filled.unflatten(2, (-1, size)).sum(3, dtype=wide)
            count = torch.full((sums.shape[2], 1), size, device=k.device, dtype=wide)
            if short:
                count[-1] = size - short
            return sums / count
        kept = c.valid[:, None, :, None]
        sums = (
            torch.nn.functional.pad(k.masked_fill(~kept, 0), (0, 0, 0, short))
            .unflatten(2, (-1, size))
            .sum(3, dtype=wide)
        )
        count = torch.nn.functional.pad(kept, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3).to(wide)
        return sums / count.clamp_min(1)


@dataclass(frozen=True)
class TopBlocks(Select):
    """For every query and head, the `top` blocks of `block` keys that the proxy scores highest.

    Under a limit that looks back, only blocks before the query's own block are candidates; the own block is not
    chosen, so unite with `chunk(block)` to keep it. No gradient flows through the choice.
    """

    block: int = arg(64, at_least=1)
    top: int = arg(4, at_least=1)
    proxy: Proxy = MeanKey()

    name = "top_blocks"

    @torch.no_grad()
    def choose(self, c: Context) -> Blocks:
        means = self.proxy.keys(c, self.block)
        blocks = means.shape[2]
        choices = min(self.top, blocks)
        shape = (*c.q.shape[:3], choices)
        index = torch.zeros(shape, dtype=torch.long, device=c.q.device)
        valid = torch.zeros(shape, dtype=torch.bool, device=c.q.device)
        numbers = torch.arange(blocks, device=c.q.device)
        for r0 in range(0, shape[2], ROWS):
            rows = slice(r0, min(shape[2], r0 + ROWS))
            open_ = numbers * self.block < c.key_ends[:, None, None, None]
            reach = blocks
            if c.looks_back:
                own = torch.div(c.i[:, rows], self.block, rounding_mode="floor")
                open_ = open_ & (numbers < own[:, None, :, None])
                if c.offset is not None:
                    reach = min(blocks, (c.offset + rows.stop - 1) // self.block)
            kept = min(choices, reach)
            if kept < 1:
                continue
            scores = grouped_matmul(c.q[:, :, rows].to(means.dtype), means[:, :, :reach].transpose(-1, -2))
            scores = scores.masked_fill(~open_[..., :reach], -torch.inf)
            best, found = scores.topk(kept, dim=-1, sorted=False)
            index[:, :, rows, :kept] = found
            valid[:, :, rows, :kept] = ~torch.isneginf(best)
        return Blocks(index, valid, self.block)


@dataclass(frozen=True)
class CentredSpan(Select):
    """Keys within `half` of a predicted centre (Luong et al., 2015: local attention).

    The stream `centre` (B, H, L) holds a key position for each query.
    """

    half: int = arg(8, at_least=0)

    name = "centred_span"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"centre": Stream("q", hidden=sizes.head_dim, positions=True)}

    @torch.no_grad()
    def choose(self, c: Context) -> Spans:
        centre = c.streams["centre"]
        return Spans(centre - self.half, centre + self.half)


@dataclass(frozen=True)
class CentroidBuckets(Select):
    """Each of `clusters` centroids takes the `width` tokens that it scores highest; attention runs inside.

    Width defaults to length / clusters. The choice looks at the whole sequence, so under a causal limit membership
    (not values) leaks the future; in decoding a token belongs to its nearest centroid instead. A token that several
    buckets took averages their outputs; one that none took gives zeros. (Roy et al., Routing Transformer, 2020.)
    """

    clusters: int = arg(8, at_least=1)
    width: int | None = arg(None, at_least=1)
    keep: float = arg(0.9, at_least=0.0)

    name = "centroid_buckets"
    buffer_names = ("centroids",)
    causal = "leak"
    relative = "top_blocks"
    leaks = True
    reach = "bucket"

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        shape = (sizes.heads, self.clusters, sizes.head_dim)
        return {"centroids": torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)}

    @torch.no_grad()
    def refresh(
        self,
        buffers: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """One step of a moving average: each centroid goes towards the tokens that are nearest to it."""
        centroids = buffers["centroids"]
        moved = []
        for x in (q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)):
            near = torch.nn.functional.one_hot(
                (x @ centroids.to(x.dtype).transpose(-1, -2)).argmax(-1), self.clusters
            ).to(x.dtype)
            if valid is not None and x.shape[2] == valid.shape[1]:
                near = near * valid[:, None, :, None]
            moved.append((torch.einsum("bhnc,bhnd->hcd", near, x), near.sum((0, 2))))
        total, count = moved[0][0] + moved[1][0], (moved[0][1] + moved[1][1]).unsqueeze(-1)
        target = torch.where(count > 0, total / count.clamp_min(1), centroids.to(total.dtype))
        fresh = self.keep * centroids.to(total.dtype) + (1 - self.keep) * target
        return {"centroids": torch.nn.functional.normalize(fresh, dim=-1).to(centroids.dtype)}

    def bucket_width(self, tokens: int) -> int:
        """Tokens that a bucket takes of a sequence."""
        return min(tokens, self.width or max(1, -(-tokens // self.clusters)))

    @torch.no_grad()
    def choose(self, c: Context) -> Buckets | Labels:
        centroids = c.buffers["centroids"].to(c.q.dtype)
        if centroids.shape[1] != self.clusters:
            raise NotSupported(
                f"centroid_buckets({self.clusters}) needs a buffer `centroids` (heads, {self.clusters}, head_dim), got {tuple(centroids.shape)}"
            )
        k = c.k.repeat_interleave(c.q.shape[1] // c.k.shape[1], dim=1)
        near_q, near_k = (x @ centroids.transpose(-1, -2) for x in (c.q, k))
        if c.decoding:
            return Labels(near_q.argmax(-1), near_k.argmax(-1))
        q, q_valid = self._members(near_q, c.query_valid)
        members, k_valid = self._members(near_k, c.valid)
        return Buckets(q, members, q_valid, k_valid)

    def _members(self, near: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens that each bucket takes, in order of position, from their scores near (b, h, n, C)."""
        n = near.shape[2]
        near = near.transpose(-1, -2)
        if valid is None:
            index = near.topk(self.bucket_width(n), dim=-1).indices.sort(-1).values
            return index, torch.ones_like(index, dtype=torch.bool)
        near = near.masked_fill(~valid[:, None, None], -torch.inf)
        widths = torch.tensor([self.bucket_width(int(x)) for x in valid.sum(-1)], device=near.device)
        index = near.topk(int(widths.max()), dim=-1).indices
        kept = (torch.arange(index.shape[-1], device=near.device) < widths[:, None, None, None]).expand_as(
            index
        )
        order = index.masked_fill(~kept, n).argsort(-1)
        return index.gather(-1, order), kept.gather(-1, order)
