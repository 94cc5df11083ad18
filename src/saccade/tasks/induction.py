"""Induction: what followed the last time that this token was seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Induction:
    """Random tokens; each that was seen before asks for the token that followed it then.

    With `repeated` the second half is the first again, whose tokens are all different, so the second half asks for
    its own next token (Olsson et al., In-context Learning and Induction Heads, 2022). The metric is `recall.accuracy`.
    """

    length: int = 32
    symbols: int = 16
    repeated: bool = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.symbols < 2:
            raise ValueError(
                f"induction needs at least 2 tokens and 2 symbols, got length {self.length} and {self.symbols} symbols"
            )
        if self.repeated and (self.length % 2 or self.length > 2 * self.symbols):
            raise ValueError(
                f"induction on a repeated string needs an even length of at most {2 * self.symbols} for {self.symbols} "
                f"symbols, got {self.length}"
            )

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all symbols."""
        return 1 / self.symbols

    @property
    def baseline(self) -> float:
        """Accuracy of a guess among the symbols seen so far."""
        if self.repeated:
            return 2 / self.length
        asked = sum(1 - (1 - 1 / self.symbols) ** before for before in range(1, self.length))
        return (self.length - 1) / self.symbols / asked

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT where a token is seen first."""
        if self.repeated:
            half = torch.rand(size, self.symbols, generator=generator).argsort(1)[:, : self.length // 2]
            tokens = torch.cat((half, half), 1)
        else:
            tokens = torch.randint(self.symbols, (size, self.length), generator=generator)
        followed = torch.full((size, self.symbols), SILENT)
        targets = torch.full_like(tokens, SILENT)
        for at in range(1, self.length):
            before, now = tokens[:, at - 1 : at], tokens[:, at : at + 1]
            followed.scatter_(1, before, now)
            targets[:, at : at + 1] = followed.gather(1, now)
        return tokens, targets
