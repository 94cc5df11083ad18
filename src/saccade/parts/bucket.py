"""Tokens gathered into buckets by content; attention runs inside each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.parts.base import Sizes, arg
from saccade.parts.pair import Context
from saccade.parts.select import Select
from saccade.parts.selection import Buckets, Labels


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
