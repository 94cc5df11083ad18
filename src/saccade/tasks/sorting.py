"""Numbers to be put in order by pointing at them, and symbols to be written in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from saccade.tasks.odds import binomial


@dataclass(frozen=True)
class Sorting:
    """`shortest` to `longest` numbers uniform on [0, 1), the same count in all rows of a batch; the answer is their order.

    A task for pointer networks (Vinyals et al., Pointer Networks, 2015). The metric is `metric.exact_match`.
    """

    shortest: int = 5
    longest: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"sorting needs 1 <= shortest <= longest, got {self.shortest} and {self.longest}"
            )

    @property
    def chance(self) -> float:
        """Exact match of any one order."""
        counts = range(self.shortest, self.longest + 1)
        return sum(1 / math.factorial(n) for n in counts) / len(counts)

    @property
    def baseline(self) -> float:
        """Exact match of sorting by the first decimal alone, equal ones as they stand."""
        counts = range(self.shortest, self.longest + 1)
        return sum(self._coarse(n) for n in counts) / len(counts)

    def _coarse(self, count: int) -> float:
        """Numbers of a bin of ten stand in order by luck: a coefficient of (sum of x^c / c!^2)^10, times count! / 10^count."""
        power = [1.0] + [0.0] * count
        for _ in range(10):
            power = [
                sum(power[i - c] / math.factorial(c) ** 2 for c in range(i + 1)) for i in range(count + 1)
            ]
        return power[count] * math.factorial(count) / 10**count

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers (size, n) float32 and the index of the least, the second and so on, (size, n) int64."""
        count = int(torch.randint(self.shortest, self.longest + 1, (1,), generator=generator))
        numbers = torch.rand(size, count, generator=generator)
        return numbers, numbers.argsort(dim=1, stable=True)


@dataclass(frozen=True)
class SymbolSorting:
    """`length` random symbols; the answer is the same symbols from least to greatest. The metric is accuracy of places."""

    length: int = 8
    symbols: int = 10

    def __post_init__(self) -> None:
        if self.length < 1 or self.symbols < 2:
            raise ValueError(
                f"symbol sorting needs a length of at least 1 and 2 symbols, got length {self.length} and "
                f"{self.symbols} symbols"
            )

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def chance(self) -> float:
        """Accuracy of the likeliest symbol of each place."""
        right = 0.0
        for place in range(self.length):
            within = [
                sum(binomial(self.length, s / self.symbols)[place + 1 :]) for s in range(self.symbols + 1)
            ]
            right += max(after - before for before, after in pairwise(within))
        return right / self.length

    @property
    def baseline(self) -> float:
        """Accuracy of knowing which symbols there are, not how often: always the next one up, or always the last once more."""
        n, symbols = self.length, self.symbols
        shown = symbols * (1 - (1 - 1 / symbols) ** n)
        greatest = (
            n / symbols * sum((s / symbols) ** (n - 1) for s in range(1, symbols + 1))
        )  # how often it stands
        return max(shown + greatest - 1, n - shown + 1) / n

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols and symbols in order, both (size, length) int64."""
        symbols = torch.randint(self.symbols, (size, self.length), generator=generator)
        return symbols, symbols.sort(1).values
