"""Attention between points that sees only what no rotation changes, and a matcher of two point clouds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade.nn.attention import Attention
from saccade.nn.transformer import FeedForward
from saccade.parts.tokens import rope_rates


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors (..., 3), in 0..pi; 0 where one of them is zero."""
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))


def point_pair_features(p: Tensor, n: Tensor, other: Tensor, other_n: Tensor) -> Tensor:
    """(|d|, angle(n, d), angle(n', d), angle(n, n')), d = p' - p, of points and normals that broadcast: (..., 4).

    (Drost et al., Model Globally, Match Locally: Efficient and Robust 3D Object Recognition, 2010.)
    """
    p, n, other, other_n = torch.broadcast_tensors(p, n, other, other_n)
    d = other - p
    return torch.stack((d.norm(dim=-1), angle(n, d), angle(other_n, d), angle(n, other_n)), -1)


def nearest(points: Tensor, count: int) -> Tensor:
    """The `count` nearest points of each, itself first: points (B, N, 3) to indices (B, N, count)."""
    if not min(1, points.shape[1]) <= count <= points.shape[1]:
        raise ValueError(
            f"each of {points.shape[1]} points has 1 to {points.shape[1]} neighbours, got {count}"
        )
    return torch.cdist(points, points).topk(count, largest=False).indices


class PPFAttention(nn.Module):
    """softmax_j((q_i.k_j + q_i.Wp r_ij) / sqrt(d)) mixing v_j + Wv r_ij over the `neighbors` nearest points (None: all).

    r_ij is a linear map of sinusoids of the point pair feature, so no rotation or translation of points and normals
    together changes the answer. With `invariant=False` r_ij embeds the offset d itself instead. O(N neighbors) pairs. (Yu et al.,
    Rotation-Invariant Transformer for Point Cloud Matching, 2023.)
    """

    def __init__(
        self, dim: int, heads: int, neighbors: int | None = 16, *, scale: float = 0.2, invariant: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads or dim % 2:
            raise ValueError(f"dim must be even and a multiple of heads, got dim={dim} and heads={heads}")
        self.heads, self.neighbors, self.scale, self.invariant = heads, neighbors, scale, invariant
        self.waves = 8
        self.relation = nn.Linear((4 if invariant else 3) * 2 * self.waves, dim)
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.key_relation, self.value_relation = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def relations(self, points: Tensor, normals: Tensor, at: Tensor) -> Tensor:
        """r_ij (B, N, k, dim) of each point and its neighbours `at` (B, N, k)."""
        rows = torch.arange(len(points), device=points.device)[:, None, None]
        own, other = points.unsqueeze(2), points[rows, at]
        if self.invariant:
            raw = point_pair_features(own, normals.unsqueeze(2), other, normals[rows, at])
            raw = raw / torch.tensor([self.scale, 1.0, 1.0, 1.0], dtype=raw.dtype, device=raw.device)
        else:
            raw = (other - own) / self.scale
        rates = 4 * rope_rates(100.0, 2 * self.waves, raw.device).to(raw.dtype)
        waves = raw.unsqueeze(-1) * rates
        return self.relation(torch.cat((waves.sin(), waves.cos()), -1).flatten(-2))

    def forward(self, x: Tensor, points: Tensor, normals: Tensor) -> Tensor:
        """x (B, N, dim), points and unit normals (B, N, 3), to (B, N, dim)."""
        if points.shape != normals.shape or points.shape[:2] != x.shape[:2] or points.shape[-1] != 3:
            raise ValueError(
                f"points and normals must be {(*x.shape[:2], 3)}, got {tuple(points.shape)} and {tuple(normals.shape)}"
            )
        at = nearest(points, min(self.neighbors or points.shape[1], points.shape[1]))
        r = self.relations(points, normals, at)
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        keys, values = (
            (y[rows, at] + relation(r)).unflatten(-1, (self.heads, -1))
            for y, relation in ((k, self.key_relation), (v, self.value_relation))
        )
        s = torch.einsum("bnhd,bnkhd->bnhk", q.unflatten(-1, (self.heads, -1)), keys) / math.sqrt(
            keys.shape[-1]
        )
        return self.out_proj(torch.einsum("bnhk,bnkhd->bnhd", torch.softmax(s, -1), values).flatten(2))


def sinkhorn(scores: Tensor, slack: Tensor, rounds: int = 20) -> Tensor:
    """Log of a soft assignment (B, n + 1, m + 1) of scores (B, n, m): rows and columns sum to 1, the last ones take what has no match.

    (Sinkhorn and Knopp, 1967; with slack as in Sarlin et al., SuperGlue, 2020.)
    """
    b, n, m = scores.shape
    s = torch.cat((scores, slack.expand(b, n, 1)), 2)
    s = torch.cat((s, slack.expand(b, 1, m + 1)), 1)
    rows, cols = (torch.zeros(size + 1, dtype=s.dtype, device=s.device) for size in (n, m))
    rows[-1], cols[-1] = math.log(m), math.log(n)
    u, v = torch.zeros_like(s[:, :, 0]), torch.zeros_like(s[:, 0])
    for _ in range(rounds):
        u = rows - torch.logsumexp(s + v.unsqueeze(1), 2)
        v = cols - torch.logsumexp(s + u.unsqueeze(2), 1)
    return s + u.unsqueeze(2) + v.unsqueeze(1)


class PointMatcher(nn.Module):
    """Two point clouds to a soft assignment: local attention, then pairs of global self-attention and cross-attention.

    With `invariant=False` it sees offsets and normals as coordinates instead of point pair features. (Yu et al., RoITr,
    2023, without its pyramid of resolutions.)
    """

    def __init__(
        self, dim: int = 32, heads: int = 4, depth: int = 1, neighbors: int = 12, *, invariant: bool = True
    ) -> None:
        super().__init__()
        self.invariant = invariant
        self.first = nn.Parameter(torch.randn(dim)) if invariant else nn.Linear(3, dim)
        options = {"invariant": invariant}
        self.local = nn.ModuleList(PPFAttention(dim, heads, neighbors, **options) for _ in range(2))
        self.everywhere = nn.ModuleList(
            PPFAttention(dim, heads, None, scale=0.5, **options) for _ in range(depth)
        )
        self.cross = nn.ModuleList(Attention(dim, heads) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4 + 3 * depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim, 2) for _ in range(2 + depth))
        self.out, self.slack = nn.Linear(dim, dim), nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, points: tuple[Tensor, Tensor], normals: tuple[Tensor, Tensor]) -> Tensor:
        """Two clouds (B, n, 3) and (B, m, 3) with unit normals to the log of an assignment (B, n + 1, m + 1)."""
        clouds = list(zip(points, normals, strict=True))
        norms, forward = iter(self.norms), iter(self.feed_forward)
        if isinstance(self.first, nn.Linear):
            x = [self.first(n) for _, n in clouds]
        else:
            x = [self.first.expand(*p.shape[:2], -1) for p, _ in clouds]
        for layer in self.local:
            norm, after, widen = next(norms), next(norms), next(forward)
            x = [y + layer(norm(y), p, n) for y, (p, n) in zip(x, clouds, strict=True)]
            x = [y + widen(after(y)) for y in x]
        for layer, cross in zip(self.everywhere, self.cross, strict=True):
            norm, between, after, widen = next(norms), next(norms), next(norms), next(forward)
            x = [y + layer(norm(y), p, n) for y, (p, n) in zip(x, clouds, strict=True)]
            a, b = (between(y) for y in x)
            x = [x[0] + cross(a, b), x[1] + cross(b, a)]
            x = [y + widen(after(y)) for y in x]
        a, b = (self.out(y) for y in x)
        return sinkhorn(a @ b.mT / math.sqrt(a.shape[-1]), self.slack)


def rigid(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation R and translation t that bring points (N, 3) nearest to others: target = source R^T + t (Kabsch, 1976)."""
    a, b = source.mean(0), target.mean(0)
    u, _, v = torch.linalg.svd((source - a).T @ (target - b))
    flip = torch.ones(3, dtype=source.dtype, device=source.device)
    flip[-1] = torch.sign(torch.linalg.det(v.T @ u.T))
    r = v.T @ torch.diag(flip) @ u.T
    return r, b - r @ a


def ransac(
    source: Tensor, target: Tensor, generator: torch.Generator, tries: int = 200, within: float = 0.05
) -> tuple[Tensor, Tensor]:
    """The rigid motion that most matched pairs (N, 3), (N, 3) agree with, from random triples (Fischler and Bolles, 1981)."""
    if len(source) < 3:
        raise ValueError(f"a rigid motion needs 3 pairs, got {len(source)}")
    best = torch.zeros(len(source), dtype=torch.bool)
    for _ in range(tries):
        some = torch.randperm(len(source), generator=generator)[:3]
        r, t = rigid(source[some], target[some])
        agree = (source @ r.T + t - target).norm(dim=-1) < within
        best = agree if int(agree.sum()) > int(best.sum()) else best
    return rigid(source[best], target[best]) if int(best.sum()) >= 3 else rigid(source, target)
