"""Strings to be written backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Reverse:
    """Strings of `shortest` to `longest` random symbols; the answer is the string backwards, then an end token.

    The metric is `metric.exact_match` on strings that are drawn anew.
    """

    symbols: int = 20
    shortest: int = 8
    longest: int = 16

    def __post_init__(self) -> None:
        if self.symbols < 2 or not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"reverse needs at least 2 symbols and 1 <= shortest <= longest, got {self.symbols} symbols and "
                f"lengths {self.shortest} to {self.longest}"
            )

    @property
    def end(self) -> int:
        """The token after the last symbol; it also starts the answer and fills up short strings."""
        return self.symbols

    @property
    def vocab(self) -> int:
        """The symbols and the end token."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """Exact match of a guess at random that knows the length."""
        lengths = range(self.shortest, self.longest + 1)
        return sum(float(self.symbols) ** -n for n in lengths) / len(lengths)

    @property
    def baseline(self) -> float:
        """Exact match of copying the string as it stands, right for palindromes alone."""
        lengths = range(self.shortest, self.longest + 1)
        return sum(float(self.symbols) ** -(n // 2) for n in lengths) / len(lengths)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Strings (size, longest), their lengths (size,) and targets (size, longest + 1), SILENT after the end."""
        lengths = torch.randint(self.shortest, self.longest + 1, (size,), generator=generator)
        symbols = torch.randint(self.symbols, (size, self.longest), generator=generator)
        at = torch.arange(self.longest + 1)
        source = symbols.masked_fill(at[:-1] >= lengths[:, None], self.end)
        back = (lengths[:, None] - 1 - at).clamp_min(0)
        targets = source.gather(1, back)
        targets = targets.masked_fill(at == lengths[:, None], self.end)
        return source, lengths, targets.masked_fill(at > lengths[:, None], SILENT)

    def shifted(self, targets: Tensor) -> Tensor:
        """What a decoder is fed to predict `targets`: the start token, then all but the last."""
        before = torch.cat((torch.full_like(targets[:, :1], self.end), targets[:, :-1]), dim=1)
        return before.masked_fill(before == SILENT, self.end)
