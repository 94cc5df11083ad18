"""Digits as eight row tokens, and a classifier of one layer, for the checks that compare layouts of heads."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from saccade.tasks.digits import Digits
from systems.helpers import train

DATA = Digits()


class RowClassifier(nn.Module):
    """Eight rows of pixels to a digit: one layer of attention by a mechanism or `super`, the mean over rows, a linear map."""

    def __init__(self, mechanism: str, heads: int = 4, dim: int = 64) -> None:
        super().__init__()
        self.rows, self.positions = nn.Linear(8, dim), nn.Parameter(0.02 * torch.randn(8, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention: nn.Module = (
            sc.nn.SuperAttention(dim, 8) if mechanism == "super" else sc.nn.Attention(dim, heads, mechanism)
        )
        self.feed_forward = FeedForward(dim, 2)
        self.digit = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) to logits (B, 10)."""
        x = self.rows(images[:, 0]) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))
        return self.digit(x.mean(1))


@cache
def accuracy(mechanism: str, seed: int, steps: int = 400, heads: int = 4) -> float:
    """Test accuracy of a trained classifier."""
    torch.manual_seed(seed)
    model = RowClassifier(mechanism, heads)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        images, labels = DATA.batch(32, generator)
        return F.cross_entropy(model(images), labels)

    train(model.parameters(), loss, steps, 6e-3)
    images, labels = DATA.test
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())
