"""Needles in a haystack: facts hidden at random places of filler, and asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Needle:
    """`needles` facts anywhere in `length` tokens, one token each, that gives a key its value; the last `queries` name keys.

    The other tokens are random filler from an alphabet of their own. The metric is `recall.accuracy`.
    """

    length: int
    needles: int = 4
    queries: int = 8
    keys: int = 8
    values: int = 8
    fillers: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= self.keys or self.queries < 1:
            raise ValueError(
                f"needle hides 1 to {self.keys} needles and asks at least once, got {self.needles} needles and "
                f"{self.queries} queries"
            )
        if self.length < self.needles + self.queries:
            raise ValueError(
                f"{self.needles} needles and {self.queries} queries need at least {self.needles + self.queries} "
                f"tokens, got {self.length}"
            )

    @property
    def vocab(self) -> int:
        """Keys, values, a fact for each key and value, fillers."""
        return self.keys + self.values + self.keys * self.values + self.fillers

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all values."""
        return 1 / self.values

    @property
    def baseline(self) -> float:
        """Accuracy of a guess among the values that were shown."""
        return 1 / self.needles

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT where nothing is asked."""
        haystack = self.length - self.queries
        place = torch.rand(size, haystack, generator=generator).argsort(1)[:, : self.needles]
        key = torch.rand(size, self.keys, generator=generator).argsort(1)[:, : self.needles]
        value = torch.randint(self.values, (size, self.needles), generator=generator)
        tokens = self.vocab - 1 - torch.randint(self.fillers, (size, self.length), generator=generator)
        tokens.scatter_(1, place, self.keys + self.values + key * self.values + value)
        asked = torch.randint(self.needles, (size, self.queries), generator=generator)
        tokens[:, haystack:] = key.gather(1, asked)
        targets = torch.full((size, self.length), SILENT)
        targets[:, haystack:] = value.gather(1, asked) + self.keys
        return tokens, targets
