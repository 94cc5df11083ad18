"""Attention between regions of an image: each region reads the few that suit it best, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class RegionRouting(nn.Module):
    """Each of `regions` x `regions` regions reads the `top` whose mean key its mean query scores highest, dense inside.

    A depthwise convolution of the values is added. An image that the regions do not divide is padded, and padding is
    never read. No gradient flows through the choice. (Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing
    Attention, 2023.)

    >>> RegionRouting(16, heads=2, regions=3, top=2)(torch.zeros(1, 70, 16), grid=(7, 10)).shape
    torch.Size([1, 70, 16])
    """

    def __init__(
        self, dim: int, heads: int, *, regions: int = 7, top: int = 4, kernel: int = 5, bias: bool = True
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a positive multiple of heads={heads}")
        if regions < 1 or not 1 <= top <= regions**2:
            raise ValueError(
                f"regions must be at least 1 and top between 1 and regions^2, got regions={regions} and top={top}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the convolution keeps the size, got {kernel}")
        self.heads, self.regions, self.top = heads, regions, top
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=bias) for _ in range(4)
        )
        self.local = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def sides(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width of a region."""
        height, width = grid
        return -(-height // self.regions), -(-width // self.regions)

    def entries(self, grid: Sequence[int]) -> int:
        """Scores that a head computes for an image, those between regions included."""
        tall, wide = self.sides(grid)
        return self.regions**2 * self.top * (tall * wide) ** 2 + self.regions**4

    def split(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Cells (B, H W, C) by region, (B, R, n, C); padding is zeros."""
        (height, width), (tall, wide), r = grid, self.sides(grid), self.regions
        x = pad(x.unflatten(1, (height, width)), (0, 0, 0, r * wide - width, 0, r * tall - height))
        return x.unflatten(1, (r, tall)).unflatten(3, (r, wide)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """The inverse of `split`."""
        (height, width), (tall, wide), r = grid, self.sides(grid), self.regions
        x = x.unflatten(1, (r, r)).unflatten(3, (tall, wide)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return x[:, :height, :width].flatten(1, 2)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        """Which regions each region reads, (B, R, top), from split q and k (B, R, n, C) and valid (R, n)."""
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        score = (q.sum(2) / count) @ (k.sum(2) / count).transpose(1, 2)
        return score.masked_fill(~valid.any(-1), -torch.inf).topk(self.top, dim=-1).indices

    def forward(self, x: Tensor, *, grid: Sequence[int]) -> Tensor:
        """Cells x (B, H W, dim) of an image, row by row, to the same shape."""
        height, width = grid
        if x.shape[1] != height * width:
            raise ValueError(
                f"a grid of {height} x {width} has {height * width} cells, but x has {x.shape[1]}"
            )
        value = self.value_proj(x)
        valid = self.split(torch.ones_like(x[:1, :, :1]), grid)[0, :, :, 0] > 0
        inside = valid[None, :, :, None]
        q, k = (self.split(f(x), grid) * inside for f in (self.query_proj, self.key_proj))
        v = self.split(value, grid)
        chosen = self.choose(q, k, valid)
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        near = valid[chosen].flatten(2)[:, :, None, None]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for y in (q, k[batch, chosen].flatten(2, 3), v[batch, chosen].flatten(2, 3))
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=near)
        image = value.transpose(1, 2).unflatten(2, (height, width))
        local = self.local(image).flatten(2).transpose(1, 2)
        return self.out_proj(self.join(out.transpose(2, 3).flatten(3), grid) + local)
