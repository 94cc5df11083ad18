"""Points of a feature map, chosen by a heat map, that lend what they hold to queries placed elsewhere in the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.parts.tokens import rope_rates


class GeometryBias(nn.Module):
    """A learned bias a head of an offset (dx, dy): an MLP of its sinusoids, evaluated once on a grid and sampled there.

    The grid has `cells` x `cells` nodes, `unit` apart, around offset 0; offsets beyond it take the nearest edge. The answer is
    exact on the nodes and bilinear between them. (Chi et al., RelationNet++: Bridging Visual Representations for Object
    Detection via Transformer Decoder, 2020.)
    """

    def __init__(
        self, heads: int, *, cells: int = 400, unit: float = 4.0, waves: int = 8, hidden: int = 32
    ) -> None:
        super().__init__()
        if cells < 2 or unit <= 0:
            raise ValueError(
                f"the grid needs at least 2 cells and a unit above 0, got cells={cells} and unit={unit}"
            )
        self.cells, self.unit, self.waves = cells, unit, waves
        self.net = nn.Sequential(nn.Linear(4 * waves, hidden), nn.ReLU(), nn.Linear(hidden, heads))

    def direct(self, offsets: Tensor) -> Tensor:
        """Offsets (..., 2) to biases (..., heads), each by the MLP itself."""
        rates = rope_rates(1000.0, 2 * self.waves, offsets.device).to(offsets.dtype)
        phase = (offsets / (3 * self.unit)).unsqueeze(-1) * rates  # slow against the nodes
        return self.net(torch.cat((phase.sin(), phase.cos()), -1).flatten(-2))

    def grid(self) -> Tensor:
        """Biases (heads, cells, cells) of the nodes, dy first."""
        like = next(self.net.parameters())
        axis = torch.arange(self.cells, device=like.device, dtype=like.dtype) - self.cells // 2
        dy, dx = torch.meshgrid(axis * self.unit, axis * self.unit, indexing="ij")
        return self.direct(torch.stack((dx, dy), -1)).permute(2, 0, 1)

    def forward(self, offsets: Tensor) -> Tensor:
        """Offsets (B, N, K, 2) to biases (B, heads, N, K), sampled from the grid."""
        b, n, k, _ = offsets.shape
        place = (offsets / self.unit + self.cells // 2) * (2 / (self.cells - 1)) - 1
        found = F.grid_sample(
            self.grid()[None],
            place.reshape(1, b * n, k, 2),
            padding_mode="border",
            align_corners=True,
        )
        return found[0].unflatten(1, (b, n)).transpose(0, 1)


def key_points(heat: Tensor, count: int, stride: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `count` hottest cells of heat maps (B, H, W): their numbers (B, K), row by row, and centres (B, K, 2) as (x, y)."""
    cells = heat.shape[1] * heat.shape[2]
    if count < 1:
        raise ValueError(f"at least one key point is read, got count={count}")
    index = heat.flatten(1).topk(min(count, cells), dim=-1).indices
    x, y = index % heat.shape[2], torch.div(index, heat.shape[2], rounding_mode="floor")
    return index, (torch.stack((x, y), -1) + 0.5) * stride


class PointBridge(nn.Module):
    """x_i + Wo sum_j softmax_j(q_i.k_j / sqrt(d) + G(p_i - p_j)) v_j over the `points` hottest cells j of a feature map.

    Wo starts at zero, so that a model to which a bridge is added computes what it did. All queries of an image read the same
    points: O(N points). (Chi et al., RelationNet++, 2020: bridging visual representations.)

    >>> bridge = PointBridge(16, heads=2, points=5)
    >>> x, at = torch.randn(1, 7, 16), torch.rand(1, 7, 2)
    >>> torch.equal(bridge(x, at, torch.randn(1, 16, 4, 4), torch.rand(1, 4, 4)), x)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        points: int = 50,
        context_dim: int | None = None,
        cells: int = 400,
        unit: float = 4.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if points < 1:
            raise ValueError(f"at least one key point is read, got points={points}")
        self.heads, self.points = heads, points
        self.geometry = GeometryBias(heads, cells=cells, unit=unit)
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_proj, self.value_proj = (nn.Linear(context_dim or dim, dim, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        features: Tensor,
        heat: Tensor,
        *,
        stride: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Queries x (B, N, dim) at places (B, N, 2), x before y, in pixels, to (B, N, dim).

        features (B, context_dim, H, W) and heat (B, H, W) have one cell every `stride` pixels; `mask` (B, H, W) is True where a
        cell may be read.
        """
        if at.shape != (*x.shape[:2], 2):
            raise ValueError(f"places must be {(*x.shape[:2], 2)}, got {tuple(at.shape)}")
        if heat.shape != (features.shape[0], *features.shape[2:]) or len(features) != len(x):
            raise ValueError(
                f"heat must be {(len(x), *features.shape[2:])} for features {tuple(features.shape)}, got {tuple(heat.shape)}"
            )
        allowed = None
        if mask is not None:
            heat = heat.masked_fill(~mask, -torch.inf)
        index, points = key_points(heat.detach(), self.points, stride)
        if mask is not None:
            allowed = mask.flatten(1).gather(1, index)[:, None, None]
        found = features.flatten(2).mT.gather(1, index.unsqueeze(-1).expand(-1, -1, features.shape[1]))
        q, k, v = (
            net(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for net, y in ((self.query_proj, x), (self.key_proj, found), (self.value_proj, found))
        )
        offsets = at.unsqueeze(2) - points.to(at.dtype).unsqueeze(1)
        s = q @ k.mT / math.sqrt(q.shape[-1]) + self.geometry(offsets)
        if allowed is not None:
            v = v.masked_fill(~allowed.squeeze(2).unsqueeze(-1), 0)
            s = s.masked_fill(~allowed, torch.finfo(s.dtype).min)
        w = torch.softmax(s, -1)
        if allowed is not None:
            w = w * allowed
        return x + self.out_proj((w @ v).transpose(1, 2).flatten(2))
