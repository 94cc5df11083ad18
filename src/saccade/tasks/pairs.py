"""Two sentences: the same words in another order, or one word exchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SentencePairs:
    """A sentence of `words` different words and a shuffled copy, in half of the pairs with one word that is not in it.

    The answer is 1 when both have the same words, else 0. The metric is `recall.accuracy`.
    """

    words: int = 6
    symbols: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.words < self.symbols:
            raise ValueError(
                f"sentence pairs need at least one word and more symbols than words, got {self.words} words and "
                f"{self.symbols} symbols"
            )

    @property
    def vocab(self) -> int:
        """The words and a token between the sentences."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 0.5

    @property
    def baseline(self) -> float:
        """Accuracy of looking whether the first word of the second sentence is in the first."""
        return 0.5 + 0.5 / self.words

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both sentences with a token between them, (size, 2 words + 1), and answers (size,), int64."""
        drawn = torch.rand(size, self.symbols, generator=generator).argsort(1)[:, : self.words + 1]
        first, other = drawn[:, :-1], drawn[:, -1:]
        same = torch.randint(2, (size,), generator=generator)
        copied = first.gather(1, torch.rand(size, self.words, generator=generator).argsort(1))
        changed = copied.scatter(1, torch.randint(self.words, (size, 1), generator=generator), other)
        second = torch.where(same[:, None] == 1, copied, changed)
        between = torch.full((size, 1), self.symbols)
        return torch.cat((first, between, second), 1), same

    def sentences(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The two sentences of a batch, each (size, words)."""
        return tokens[:, : self.words], tokens[:, self.words + 1 :]
