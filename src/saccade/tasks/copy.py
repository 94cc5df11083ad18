"""Strings to be written again: as they stand, backwards, or with some symbols written several times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.odds import order_blind
from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Copy:
    """`shortest` to `length` random symbols (`length` alone when `shortest` is None), an end token, the answer, the end.

    The answer is the string, backwards with `reverse`; symbol s stands in it `repeats[s % len(repeats)]` times (ReCopy;
    Chowdhury and Caragea, Monotonic Location Attention for Length Generalization, 2023). The metric is
    `recall.accuracy` of places of the answer, or `metric.exact_match` of whole answers.
    """

    length: int = 16
    symbols: int = 10
    shortest: int | None = None
    reverse: bool = False
    repeats: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.symbols < 2 or not self.lengths or self.lengths[0] < 1:
            raise ValueError(
                f"copy needs at least 2 symbols and 1 <= shortest <= length, got {self.symbols} symbols, "
                f"shortest {self.shortest} and length {self.length}"
            )
        if not self.repeats or min(self.repeats) < 1:
            raise ValueError(f"copy repeats each symbol at least once, got repeats {self.repeats}")

    @property
    def lengths(self) -> range:
        """How many symbols a string may have."""
        return range(self.length if self.shortest is None else self.shortest, self.length + 1)

    @property
    def end(self) -> int:
        """The token after the last symbol; it also starts the answer and fills up short rows."""
        return self.symbols

    @property
    def vocab(self) -> int:
        """The symbols and the end token."""
        return self.symbols + 1

    @property
    def width(self) -> int:
        """Tokens in a row of `batch`."""
        return self.length + 1 + self.length * max(self.repeats)

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all symbols, that knows how often each is written and where the end is."""
        return self._accuracy([1 / self.symbols] * len(self.lengths))

    @property
    def baseline(self) -> float:
        """Accuracy of the most frequent symbol that is still to come: it knows the string but not its order."""
        return self._accuracy([order_blind(n, self.symbols) for n in self.lengths])

    def _accuracy(self, guesses: list[float]) -> float:
        """Of all places, when each string length has its accuracy on first copies and all other places are right."""
        written = sum(self.repeats[s % len(self.repeats)] for s in range(self.symbols)) / self.symbols
        right = sum(n * (guess + written - 1) + 1 for n, guess in zip(self.lengths, guesses, strict=True))
        return right / sum(n * written + 1 for n in self.lengths)

    def pairs(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For encoder-decoders: strings (size, length), their lengths (size,), answers (size, width - length).

        Strings are filled up with end tokens; answers end with one and are SILENT after it.
        """
        lengths = torch.randint(self.lengths[0], self.length + 1, (size, 1), generator=generator)
        symbols = torch.randint(self.symbols, (size, self.length), generator=generator)
        at = torch.arange(self.length)
        order = symbols.gather(1, (lengths - 1 - at).clamp_min(0)) if self.reverse else symbols
        times = torch.tensor(self.repeats)[order % len(self.repeats)].masked_fill(at >= lengths, 0)
        ends = times.cumsum(1)
        place = torch.arange(self.width - self.length).expand(size, -1).contiguous()
        answer = order.gather(1, torch.searchsorted(ends, place, right=True).clamp_max(self.length - 1))
        answer = answer.masked_fill(place == ends[:, -1:], self.end).masked_fill(place > ends[:, -1:], SILENT)
        return symbols.masked_fill(at >= lengths, self.end), lengths[:, 0], answer

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For causal models: tokens and targets, both (size, width) int64; targets are SILENT outside the answer."""
        source, lengths, answer = self.pairs(size, generator)
        tokens = torch.full((size, self.width), self.end)
        tokens[:, : self.length] = source
        at = lengths[:, None] + torch.arange(answer.shape[1])
        tokens.scatter_(1, at[:, 1:], answer[:, :-1].masked_fill(answer[:, :-1] == SILENT, self.end))
        return tokens, torch.full_like(tokens, SILENT).scatter(1, at, answer)

    def shifted(self, answer: Tensor) -> Tensor:
        """What a decoder is fed to predict `answer`: the end token, then all but the last."""
        before = torch.cat((torch.full_like(answer[:, :1], self.end), answer[:, :-1]), dim=1)
        return before.masked_fill(before == SILENT, self.end)
