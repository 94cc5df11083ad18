"""Mixtures of sines to be continued."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Waves:
    """Series of `length` values: the sum of `sines` with random periods, phases and heights, and some noise.

    The metric is the mean squared error of values to come.
    """

    length: int = 64
    sines: int = 2
    shortest: float = 12.0
    longest: float = 40.0
    noise: float = 0.02

    def __post_init__(self) -> None:
        if self.length < 2 or self.sines < 1 or not 2 < self.shortest <= self.longest or self.noise < 0:
            raise ValueError(
                f"waves needs a length of at least 2, a sine, periods above 2 and noise of at least 0, got {self}"
            )

    @property
    def chance(self) -> float:
        """The error of always answering zero: the variance of a series."""
        return self.sines * (0.5**2 + 0.5 + 1) / 6 + self.noise**2

    @property
    def floor(self) -> float:
        """The error of a forecaster that knows the sines."""
        return self.noise**2

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Series, (size, length) float32."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(size, self.sines, 1, generator=generator)

        rate = 2 * math.pi / torch.exp(uniform(math.log(self.shortest), math.log(self.longest)))
        waves = uniform(0.5, 1) * torch.sin(rate * torch.arange(self.length) + uniform(0, 2 * math.pi))
        return waves.sum(1) + self.noise * torch.randn(size, self.length, generator=generator)

    def baseline(self, series: Tensor, ahead: int) -> float:
        """The error of answering the last value, for the next `ahead` values."""
        windows = series.unfold(1, ahead + 1, 1)
        return float((windows[..., 1:] - windows[..., :1]).square().mean())
