"""A token some steps to the left: which it is, or whether it is the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.odds import binomial, top_share
from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Previous:
    """Random tokens; each asks for the token `lag` to its left, or with `equal` whether that is the same (1) or not (0).

    Two symbols make both answers of `equal` alike likely. The metric is `recall.accuracy`.
    """

    length: int = 32
    symbols: int = 8
    lag: int = 1
    equal: bool = False

    def __post_init__(self) -> None:
        if self.symbols < 2 or not 1 <= self.lag < self.length:
            raise ValueError(
                f"previous needs at least 2 symbols and a lag of 1 to length - 1, got {self.symbols} symbols, "
                f"lag {self.lag} and length {self.length}"
            )

    @property
    def vocab(self) -> int:
        """The symbols, which are also the answers."""
        return self.symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the symbols, or of always saying that the tokens differ."""
        return 1 - 1 / self.symbols if self.equal else 1 / self.symbols

    @property
    def baseline(self) -> float:
        """Accuracy of the best answer for what is seen without positions: the token itself and the bag of all others."""
        others = self.length - 1
        if not self.equal:
            return top_share(others, self.symbols)
        odds = binomial(others, 1 / self.symbols)
        return sum(p * max(same, others - same) / others for same, p in enumerate(odds))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; the first `lag` targets are SILENT."""
        tokens = torch.randint(self.symbols, (size, self.length), generator=generator)
        before = tokens[:, : -self.lag]
        targets = torch.full_like(tokens, SILENT)
        targets[:, self.lag :] = (before == tokens[:, self.lag :]).long() if self.equal else before
        return tokens, targets
