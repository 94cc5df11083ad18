"""Two marked numbers of a long series are to be added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adding:
    """`length` numbers in 0..1, each with a mark of 0 or 1; one number of each half is marked, and their sum is asked.

    The metric is the squared error (Hochreiter and Schmidhuber, Long Short-Term Memory, 1997).
    """

    length: int = 128

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"adding marks a number in each half: length is at least 2, got {self.length}")

    @property
    def chance(self) -> float:
        """The error of always answering one: the variance of the sum."""
        return 2 / 12

    @property
    def baseline(self) -> float:
        """The error of adding a half to the second number alone."""
        return 1 / 12

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers and marks (size, length, 2), and sums (size,), both float32."""
        numbers = torch.rand(size, self.length, generator=generator)
        half = self.length // 2
        first = torch.randint(half, (size, 1), generator=generator)
        second = torch.randint(half, self.length, (size, 1), generator=generator)
        marks = torch.zeros_like(numbers).scatter_(1, torch.cat((first, second), 1), 1.0)
        return torch.stack((numbers, marks), -1), (numbers * marks).sum(1)
