"""Strings of a language, read through a noise that replaces symbols."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisyText:
    """Strings of a Markov chain in which each symbol is followed by one of two, and the same with symbols replaced.

    A symbol of the source is with probability `noise` any of `symbols`, drawn anew. What a source leaves open, the language
    knows: a model of strings alone helps to read it. `language` seeds the chain. The metric is `recall.accuracy`.
    """

    length: int = 16
    symbols: int = 12
    noise: float = 0.4
    language: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.symbols < 3 or not 0 <= self.noise <= 1:
            raise ValueError(
                "a noisy text needs a length of at least 1, at least 3 symbols and a noise of 0 to 1, got "
                f"{self.length}, {self.symbols} and {self.noise}"
            )

    @property
    def vocab(self) -> int:
        """The symbols and a start."""
        return self.symbols + 1

    @property
    def start(self) -> int:
        """The token before the first symbol."""
        return self.symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / self.symbols

    @property
    def baseline(self) -> float:
        """Accuracy of the symbol of the source at the same place."""
        return 1 - self.noise + self.noise / self.symbols

    def followers(self) -> Tensor:
        """The two symbols that may follow each, (symbols, 2): the first does in three of four cases."""
        generator = torch.Generator().manual_seed(self.language)
        return torch.rand(self.symbols, self.symbols, generator=generator).argsort(1)[:, :2]

    def strings(self, size: int, generator: torch.Generator) -> Tensor:
        """Strings of the language, (size, length) int64."""
        follows = self.followers()
        found = [torch.randint(self.symbols, (size,), generator=generator)]
        for _ in range(self.length - 1):
            rare = (torch.rand(size, generator=generator) < 0.25).long()
            found.append(follows[found[-1], rare])
        return torch.stack(found, 1)

    def pairs(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sources and the strings that they come from, both (size, length) int64."""
        text = self.strings(size, generator)
        other = torch.randint(self.symbols, text.shape, generator=generator)
        replaced = torch.rand(text.shape, generator=generator) < self.noise
        return torch.where(replaced, other, text), text

    def decoded(self, text: Tensor) -> Tensor:
        """What a decoder reads to write `text`: the start and all symbols but the last."""
        return torch.cat((torch.full_like(text[:, :1], self.start), text[:, :-1]), 1)
