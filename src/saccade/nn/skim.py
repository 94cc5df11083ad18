"""Attention by the layout of a page: its weights are computed once and serve every layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade.nn.transformer import FeedForward


class BoxEmbedding(nn.Module):
    """The sum of six learned vectors, for x0, y0, x1, y1, width and height of a box on a page of `size` x `size`."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for _ in range(6))

    def forward(self, boxes: Tensor) -> Tensor:
        """Boxes (B, n, 4) of whole numbers x0 <= x1 and y0 <= y1 in 0..size-1, to (B, n, dim)."""
        x0, y0, x1, y1 = boxes.unbind(-1)
        if boxes.numel() and (int(boxes.min()) < 0 or int(boxes.max()) >= self.size):
            raise ValueError(
                f"box coordinates must lie in 0..{self.size - 1}, got {boxes.min()} to {boxes.max()}"
            )
        if bool(((x1 < x0) | (y1 < y0)).any()):
            raise ValueError("a box is (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
        sides = (x0, y0, x1, y1, x1 - x0, y1 - y0)
        return torch.stack([table(side) for table, side in zip(self.tables, sides, strict=True)]).sum(0)


class SkimAttention(nn.Module):
    """softmax(Wq l (Wk l)^T / sqrt(d)) of layout vectors l alone (Nguyen et al., Skim-Attention, 2021)."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        self.heads, self.boxes = heads, BoxEmbedding(dim, size)
        self.query_proj, self.key_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, boxes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Boxes (B, n, 4) to weights (B, heads, n, n); later tokens than `lengths` (B,) get none."""
        layout = self.boxes(boxes)
        q, k = (
            p(layout).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.query_proj, self.key_proj)
        )
        s = q @ k.mT / math.sqrt(q.shape[-1])
        if lengths is not None:
            s = s.masked_fill(
                torch.arange(s.shape[-1], device=s.device) >= lengths[:, None, None, None], -1e30
            )
        return torch.softmax(s, -1)


def skimming_mask(weights: Tensor, top: int) -> Tensor:
    """The `top` keys of each row of weights (B, heads, n, n), averaged over heads, as a mask (B, 1, n, n) for `attend`."""
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    mean = weights.mean(1, keepdim=True)
    kept = mean.topk(min(top, mean.shape[-1]), dim=-1).indices
    return torch.zeros_like(mean, dtype=torch.bool).scatter(-1, kept, True) & (mean > 0)


class Skimformer(nn.Module):
    """Tokens (B, n) with boxes (B, n, 4) to logits (B, n, vocab); every layer mixes its values by the same weights.

    (Nguyen et al., Skim-Attention: Learning to Focus via Document Layout, 2021.)
    """

    def __init__(self, vocab: int, dim: int = 64, depth: int = 2, heads: int = 4, size: int = 64) -> None:
        super().__init__()
        self.tokens, self.skim = nn.Embedding(vocab, dim), SkimAttention(dim, heads, size)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.values = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim) for _ in range(depth))

    def forward(self, tokens: Tensor, boxes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of every token; later tokens than `lengths` (B,) are padding."""
        x, weights = self.tokens(tokens), self.skim(boxes, lengths)
        layers = zip(self.values, self.outs, self.feed_forward, strict=True)
        for n, (value, out, feed_forward) in enumerate(layers):
            v = value(self.norms[2 * n](x)).unflatten(-1, (self.skim.heads, -1)).transpose(1, 2)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
            x = x + feed_forward(self.norms[2 * n + 1](x))
        return self.norms[-1](x) @ self.tokens.weight.T
