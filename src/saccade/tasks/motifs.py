"""Which of several motif families occurs in a long string of random symbols."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Motifs:
    """A family is an order of the same `width` symbols; a string holds `copies` of one, each with one symbol redrawn.

    The families share their symbols, so counting symbols does not tell them apart. The metric is accuracy.
    """

    length: int = 256
    families: int = 4
    symbols: int = 12
    width: int = 6
    copies: int = 4

    def __post_init__(self) -> None:
        if self.families < 2 or not 2 <= self.width <= self.symbols:
            raise ValueError(
                f"motifs needs at least 2 families and a width of 2 to {self.symbols} symbols, got {self.families} "
                f"families and width {self.width}"
            )
        if self.copies < 1 or self.copies * self.width > self.length:
            raise ValueError(f"{self.copies} copies of {self.width} symbols do not fit into {self.length}")

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess at random, and of counting symbols."""
        return 1 / self.families

    @cached_property
    def orders(self) -> Tensor:
        """The families' motifs, (families, width)."""
        generator = torch.Generator().manual_seed(0)
        return torch.stack([torch.randperm(self.width, generator=generator) for _ in range(self.families)])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Strings (size, length) and the family that each holds, (size,), int64."""
        tokens = torch.randint(self.symbols, (size, self.length), generator=generator)
        family = torch.randint(self.families, (size,), generator=generator)
        room = self.length // self.copies
        for copy in range(self.copies):
            motif = self.orders[family]
            changed = torch.randint(self.width, (size, 1), generator=generator)
            motif = motif.scatter(1, changed, torch.randint(self.symbols, (size, 1), generator=generator))
            start = copy * room + torch.randint(room - self.width + 1, (size, 1), generator=generator)
            tokens = tokens.scatter(1, start + torch.arange(self.width), motif)
        return tokens, family

    def baseline(self, tokens: Tensor, family: Tensor) -> float:
        """Accuracy of the family whose motif, unchanged in all but one place, is found most often."""
        windows = tokens.unfold(1, self.width, 1)
        hits = (windows[:, :, None] == self.orders).sum(-1) >= self.width - 1
        return float((hits.sum(1).argmax(1) == family).float().mean())
