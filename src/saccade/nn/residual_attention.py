"""Residual attention on images: a mask branch that looks at the whole map, and a trunk that it can never silence."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.nn.gates import check_map


class ResidualUnit(nn.Sequential):
    """x + two 3x3 convolutions of relu(norm x): (B, C, H, W) to itself. (He et al., Identity Mappings, 2016.)"""

    def __init__(self, channels: int) -> None:
        super().__init__(
            *(
                layer
                for _ in range(2)
                for layer in (
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                )
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mixed(x: Tensor) -> Tensor:
    """A sigmoid on each channel and place by itself."""
    return torch.sigmoid(x)


def channelwise(x: Tensor) -> Tensor:
    """The channels of a place, over their L2 norm."""
    return F.normalize(x, dim=1)


def spatial(x: Tensor) -> Tensor:
    """A sigmoid on each channel, standardised over its places."""
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = x.flatten(2).to(wide)
    centred = flat - flat.mean(-1, keepdim=True)
    return (
        torch.sigmoid(centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
        .to(x.dtype)
        .view_as(x)
    )


ENDINGS = {"mixed": mixed, "channel": channelwise, "spatial": spatial}


class UpDownMask(nn.Module):
    """A mask M (B, C, H, W) of a map in its own shape: `downs` poolings with `units` residual units, as many upsamplings.

    Each size but the least passes through a unit of its own to meet the way up; two 1x1 convolutions and an ending
    close: "mixed" is a sigmoid, "channel" divides a place by its L2 norm, "spatial" standardises a channel before the
    sigmoid. (Wang et al., Residual Attention Network for Image Classification, 2017.)
    """

    def __init__(
        self,
        channels: int,
        downs: int = 1,
        units: int = 1,
        ending: Literal["mixed", "channel", "spatial"] = "mixed",
    ) -> None:
        super().__init__()
        if downs < 1 or units < 1:
            raise ValueError(f"downs and units must be at least 1, got downs={downs} and units={units}")
        if ending not in ENDINGS:
            raise ValueError(f"ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
        self.channels, self.ending = channels, ending
        self.down, self.up = (
            nn.ModuleList(
                nn.Sequential(*(ResidualUnit(channels) for _ in range(units))) for _ in range(downs)
            )
            for _ in range(2)
        )
        self.skip = nn.ModuleList(ResidualUnit(channels) for _ in range(downs - 1))
        self.close = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels, 2)
        sizes, kept = [], []
        for n, units in enumerate(self.down):
            sizes.append(x.shape[-2:])
            kept.append(self.skip[n - 1](x) if n else None)
            x = units(F.max_pool2d(x, 3, stride=2, padding=1))
        for units, size, skip in zip(self.up, reversed(sizes), reversed(kept), strict=True):
            x = F.interpolate(units(x), size=size, mode="bilinear", align_corners=False)
            x = x if skip is None else x + skip
        return ENDINGS[self.ending](self.close(x))


class ResidualAttention(nn.Module):
    """(1 + mask(x)) * trunk(x): a gate that can raise and never silence its trunk (Wang et al., 2017, as UpDownMask)."""

    def __init__(self, trunk: nn.Module, mask: nn.Module) -> None:
        super().__init__()
        self.trunk, self.mask = trunk, mask

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.mask(x)) * self.trunk(x)


class ResidualAttentionNetwork(nn.Module):
    """Images (B, image_channels, H, W) to logits (B, classes): a stage a width, each halving the map after the first.

    A stage is `outer` residual units, ResidualAttention around `inner` units with an UpDownMask, `outer` units again.
    Masks of earlier, larger stages go deeper down. `masked=False` leaves the trunk alone, to compare with.
    (Wang et al., Residual Attention Network for Image Classification, 2017.)

    >>> ResidualAttentionNetwork(classes=3, widths=(4, 8))(torch.zeros(2, 1, 9, 9)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...] = (16, 32, 64),
        image_channels: int = 1,
        outer: int = 1,
        inner: int = 2,
        ending: Literal["mixed", "channel", "spatial"] = "mixed",
        masked: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image_channels
        for n, width in enumerate(widths):
            trunk = nn.Sequential(*(ResidualUnit(width) for _ in range(inner)))
            mask = UpDownMask(width, len(widths) - n, 1, ending) if masked else None
            layers += [
                nn.Conv2d(before, width, 3, stride=2 if n else 1, padding=1, bias=False),
                *(ResidualUnit(width) for _ in range(outer)),
                trunk if mask is None else ResidualAttention(trunk, mask),
                *(ResidualUnit(width) for _ in range(outer)),
            ]
            before = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU())
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((-1, -2)))
