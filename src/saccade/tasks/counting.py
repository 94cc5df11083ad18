"""Counting: how many `a` since the last reset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saccade.tasks.odds import binomial


@dataclass(frozen=True)
class Counting:
    """Tokens `a`, reset and fillers at random; every position asks how many `a` came since the last reset, itself included.

    Counts above `most` are answered `most`. Before any reset the count runs from the start. Answers are the tokens 0 to
    `most`. The metric is `recall.accuracy`.
    """

    length: int = 32
    most: int = 9
    share: float = 0.4
    reset: float = 0.1
    fillers: int = 4

    def __post_init__(self) -> None:
        if self.length < 1 or self.most < 1 or self.fillers < 1:
            raise ValueError(
                f"counting needs a length, a greatest count and fillers of at least 1, got {self}"
            )
        if not (0 < self.share < 1 and self.reset >= 0 and self.share + self.reset <= 1):
            raise ValueError(
                "counting: the share of a must be above 0, that of resets at least 0, both at most 1 together, got "
                f"share {self.share} and reset {self.reset}"
            )

    @property
    def a(self) -> int:
        """The token that counts; the reset and the fillers come after it."""
        return self.most + 1

    @property
    def vocab(self) -> int:
        """Counts, `a`, reset, fillers."""
        return self.most + 3 + self.fillers

    def counts(self, since: int) -> list[float]:
        """The odds of each answer when the last reset, or the start, is `since` tokens back."""
        odds = binomial(since, self.share / (1 - self.reset)) + [0.0] * self.most
        return odds[: self.most] + [sum(odds[self.most :])]

    def ages(self, position: int) -> list[float]:
        """The odds, at a position, that the last reset is 0, 1... tokens back, and last that there was none."""
        kept = 1 - self.reset
        return [self.reset * kept**age for age in range(position + 1)] + [kept ** (position + 1)]

    @property
    def chance(self) -> float:
        """Accuracy of the likeliest count at each position."""
        counts = np.array([self.counts(age) for age in range(self.length + 1)])
        return float(np.mean([(self.ages(at) @ counts[: at + 2]).max() for at in range(self.length)]))

    @property
    def baseline(self) -> float:
        """Accuracy of the likeliest count for what is seen of resets alone: how far back the last one is."""
        best = [max(self.counts(age)) for age in range(self.length + 1)]
        right = (odds * best[age] for at in range(self.length) for age, odds in enumerate(self.ages(at)))
        return sum(right) / self.length

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and counts, both (size, length) int64."""
        draw = torch.rand(size, self.length, generator=generator)
        hits, resets = draw < self.share, draw >= 1 - self.reset
        tokens = self.a + 2 + torch.randint(self.fillers, (size, self.length), generator=generator)
        tokens = tokens.masked_fill(hits, self.a).masked_fill(resets, self.a + 1)
        counted = hits.cumsum(1)
        before = counted.masked_fill(~resets, 0).cummax(1).values
        return tokens, (counted - before).clamp_max(self.most)
