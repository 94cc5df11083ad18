"""English number words to digits: 'four hundred two' to '402', with numbers that are never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
ONES += ["seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = [*ONES, *TENS, "hundred", "thousand"]


def words(number: int) -> list[str]:
    """The words of 0..999999, most significant first."""
    if number >= 1000:
        rest = number % 1000
        return [*words(number // 1000), "thousand", *(words(rest) if rest else [])]
    if number >= 100:
        rest = number % 100
        return [ONES[number // 100], "hundred", *(words(rest) if rest else [])]
    if number >= 20:
        return [TENS[number // 10 - 2], *([ONES[number % 10]] if number % 10 else [])]
    return [ONES[number]]


@dataclass(frozen=True)
class Numerals:
    """Numbers below 10^`digits`, at most 10^6. The digits keep their leading zeros, so every answer is `digits` long.

    Every tenth number, after a fixed shuffle, is held out. The metric is `metric.exact_match`.
    """

    digits: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 6:
            raise ValueError(f"numerals has words for 1 to 6 digits, got {self.digits}")

    @property
    def vocab(self) -> int:
        """Ten digits, the start token, then the words."""
        return 11 + len(WORDS)

    @property
    def start(self) -> int:
        """The token before the first digit."""
        return 10

    @property
    def source_length(self) -> int:
        """The most words that a number has."""
        return max(len(words(n)) for n in (777777 % 10**self.digits, 7))

    @property
    def chance(self) -> float:
        """Exact match of a guess at random."""
        return 10.0**-self.digits

    @cached_property
    def order(self) -> Tensor:
        """All numbers, shuffled; the last tenth is held out."""
        return torch.randperm(10**self.digits, generator=torch.Generator().manual_seed(0))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Training words (size, S), their counts (size,) and digits (size, digits), all int64."""
        draws = torch.randint(9 * 10 ** (self.digits - 1), (size,), generator=generator)
        return self.encode(self.order[draws].tolist())

    def heldout(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `size` numbers that are never trained on, as `batch` gives them."""
        return self.encode(self.order[9 * 10 ** (self.digits - 1) :][:size].tolist())

    def encode(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Words, their counts and the digits of some numbers."""
        rows = [torch.tensor([11 + WORDS.index(w) for w in words(n)]) for n in numbers]
        lengths = torch.tensor([len(row) for row in rows])
        digits = torch.tensor([[int(c) for c in f"{n:0{self.digits}d}"] for n in numbers])
        return pad_sequence(rows, batch_first=True), lengths, digits

    def shifted(self, digits: Tensor) -> Tensor:
        """What a decoder is fed to predict `digits`: the start token, then all but the last."""
        return torch.cat((torch.full_like(digits[:, :1], self.start), digits[:, :-1]), dim=1)

    def baseline(self, size: int = 1000) -> float:
        """Exact match, on held-out numbers, of the last digit of every word in order, filled up with zeros on the left."""
        source, lengths, digits = self.heldout(size)
        right = 0
        for row, n, wanted in zip(source.tolist(), lengths.tolist(), digits.tolist(), strict=True):
            said = [w - 11 for w in row[:n] if w - 11 < len(ONES) + len(TENS)]
            named = [w % 10 if w < len(ONES) else w - len(ONES) + 2 for w in said]
            right += ([0] * self.digits + named)[-self.digits :] == wanted
        return right / size
