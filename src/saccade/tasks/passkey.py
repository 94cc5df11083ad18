"""A passkey in filler: a few digits somewhere in a long text, asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.odds import order_blind
from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Passkey:
    """One phrase over and over, cut by a mark and the key's `digits`; an ask token ends it and the key is the answer.

    `length` counts the ask token and the digits that are fed back. After Mohtashami and Jaggi, Landmark Attention:
    Random-Access Infinite Context Length for Transformers, 2023. The metric is `recall.accuracy` of digits, or
    `metric.exact_match` of keys. The model must be causal.
    """

    length: int = 64
    digits: int = 4
    phrase: int = 8

    def __post_init__(self) -> None:
        if self.digits < 1 or self.phrase < 1:
            raise ValueError(
                f"passkey needs at least one digit and one filler word, got {self.digits} digits and phrase {self.phrase}"
            )
        if self.length < 2 * self.digits + 1:
            raise ValueError(
                f"a passkey of {self.digits} digits needs at least {2 * self.digits + 1} tokens, got {self.length}"
            )

    @property
    def mark(self) -> int:
        """The token before the key."""
        return 10

    @property
    def ask(self) -> int:
        """The token that asks for the key."""
        return 11

    @property
    def vocab(self) -> int:
        """Ten digits, mark, ask, the words of the phrase."""
        return 12 + self.phrase

    @property
    def chance(self) -> float:
        """Accuracy of a guess among ten digits."""
        return 0.1

    @property
    def baseline(self) -> float:
        """Accuracy of the most frequent digit of the key that is still to come: it knows the digits, not their order."""
        return order_blind(self.digits, 10)

    def batch(
        self, size: int, generator: torch.Generator, depth: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT before the ask token.

        The mark stands anywhere, or at the share `depth` (0 to 1) of the places where it can.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"passkey: depth is a share of 0 to 1, got {depth}")
        asked = self.length - self.digits
        room = asked - self.digits - 1
        key = torch.randint(10, (size, self.digits), generator=generator)
        start = torch.randint(room + 1, (size, 1), generator=generator)
        if depth is not None:
            start = torch.full_like(start, round(depth * room))
        shift = torch.randint(self.phrase, (size, 1), generator=generator)
        tokens = 12 + (torch.arange(self.length) + shift) % self.phrase
        tokens.scatter_(1, start, self.mark)
        tokens.scatter_(1, start + 1 + torch.arange(self.digits), key)
        tokens[:, asked] = self.ask
        tokens[:, asked + 1 :] = key[:, :-1]
        targets = torch.full_like(tokens, SILENT)
        targets[:, asked:] = key
        return tokens, targets
