"""Gates on feature maps (B, C, ...): a factor between 0 and 1 for each channel, place or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_map(x: Tensor, channels: int | None = None, axes: int | None = None) -> None:
    """Raises where x is no feature map (B, channels, ...), with `axes` axes of places and a place on each."""
    if x.dim() < 3 or channels not in (None, x.shape[1]) or axes not in (None, x.dim() - 2) or not x.shape[1]:
        raise ValueError(
            f"a feature map must be (batch, {channels or 'channels'}, ...) with {axes or 'one or more'} axes of places, "
            f"got {tuple(x.shape)}"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"a feature map without places has nothing to pool, got {tuple(x.shape)}")


def check_ratio(channels: int, ratio: int) -> int:
    """The width of a squeeze, channels / ratio. Raises where it would be no whole number of at least 1."""
    if ratio < 1 or channels < 1 or channels % ratio:
        raise ValueError(
            f"ratio must be a whole number that divides the {channels} channels, got ratio={ratio}"
        )
    return channels // ratio


class ChannelGate(nn.Module):
    """x * sigmoid(mlp(mean x) + mlp(max x)), mean and max over places, one mlp C -> C / ratio -> C without biases.

    x is (B, C, ...) with any number of axes of places. (Woo et al., CBAM: Convolutional Block Attention Module, 2018.)
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        self.channels, inner = channels, check_ratio(channels, ratio)
        self.mlp = nn.Sequential(
            nn.Linear(channels, inner, bias=False), nn.ReLU(), nn.Linear(inner, channels, bias=False)
        )

    def gate(self, x: Tensor) -> Tensor:
        """The factor of each channel, (B, C, 1, ...)."""
        check_map(x, self.channels)
        flat = x.flatten(2)
        return torch.sigmoid(self.mlp(flat.mean(-1)) + self.mlp(flat.amax(-1))).reshape(
            *x.shape[:2], *[1] * (x.dim() - 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class SpatialGate(nn.Module):
    """x * sigmoid(conv([mean x; max x])), mean and max over channels, one convolution of `size` places a side, no bias.

    x is (B, C, ...) with `axes` axes of places, 1 to 3. (Woo et al., CBAM, 2018.)
    """

    def __init__(self, size: int = 7, axes: int = 2) -> None:
        super().__init__()
        if axes not in CONVOLUTIONS:
            raise ValueError(f"axes must be 1, 2 or 3, got {axes}")
        if size < 1 or not size % 2:
            raise ValueError(f"size must be odd, so that a place is its window's middle, got {size}")
        self.axes = axes
        self.conv = CONVOLUTIONS[axes](2, 1, size, padding=size // 2, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """The factor of each place, (B, 1, ...)."""
        check_map(x, axes=self.axes)
        return torch.sigmoid(self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class CBAM(nn.Sequential):
    """The channel gate, then the spatial gate, on a feature map (B, C, ...) with `axes` axes of places.

    2 C^2 / ratio + 2 size^axes parameters. (Woo et al., CBAM, 2018.)

    >>> CBAM(32)(torch.zeros(2, 32, 9, 9)).shape
    torch.Size([2, 32, 9, 9])
    """

    def __init__(self, channels: int, ratio: int = 16, size: int = 7, axes: int = 2) -> None:
        super().__init__()
        self.channel, self.spatial = ChannelGate(channels, ratio), SpatialGate(size, axes)


class SentenceGate(nn.Module):
    """x * sigmoid(W2 relu(W1 [mean x; e])): each channel's factor follows from the map and from a sentence's vector e.

    x is (B, C, ...), e (B, sentence_dim). (Khoshsirat and Kambhamettu, Sentence Attention Blocks for Answer
    Grounding, 2023.)

    >>> SentenceGate(8, sentence_dim=5, ratio=2)(torch.zeros(2, 8, 4, 4), torch.zeros(2, 5)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, sentence_dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.channels, self.sentence_dim = channels, sentence_dim
        self.squeeze = nn.Linear(channels + sentence_dim, check_ratio(channels, ratio))
        self.excite = nn.Linear(channels // ratio, channels)

    def gate(self, x: Tensor, sentence: Tensor) -> Tensor:
        """The factor of each channel, (B, C, 1, ...)."""
        check_map(x, self.channels)
        if sentence.shape != (len(x), self.sentence_dim):
            raise ValueError(
                f"the sentence vectors must be {(len(x), self.sentence_dim)}, got {tuple(sentence.shape)}"
            )
        both = torch.cat((x.flatten(2).mean(-1), sentence), dim=-1)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(both)))).reshape(
            *x.shape[:2], *[1] * (x.dim() - 2)
        )

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        return x * self.gate(x, sentence)
