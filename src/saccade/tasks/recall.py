"""Multi-query associative recall: key-value pairs are shown once, then many keys are asked for their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SILENT = -100  # the target of a position that is not asked; the loss skips it


@dataclass(frozen=True)
class Recall:
    """`pairs` keys and values side by side, then filler, then `queries` keys, `length` tokens in all.

    Keys and values are drawn without repetition from alphabets of their own. The answer to a query is never shown,
    so the pair itself is the one place to read it from.
    """

    length: int
    pairs: int = 8
    queries: int = 32
    keys: int = 16
    values: int = 16

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.queries < 1 or self.pairs > min(self.keys, self.values):
            raise ValueError(
                f"recall of {self.pairs} pairs and {self.queries} queries: give at least one of each, and at most "
                f"{min(self.keys, self.values)} pairs for alphabets of {self.keys} keys and {self.values} values"
            )
        if self.length < 2 * self.pairs + self.queries:
            raise ValueError(
                f"recall at length {self.length}: {self.pairs} pairs and {self.queries} queries need "
                f"at least {2 * self.pairs + self.queries} tokens"
            )

    @property
    def vocab(self) -> int:
        """Keys, then values, then one filler token."""
        return self.keys + self.values + 1

    @property
    def chance(self) -> float:
        """Accuracy of the best guess that sees which values were shown and cannot tell which key had which."""
        return 1 / self.pairs

    @property
    def beyond(self) -> int:
        """The fewest tokens from a query back to the value that answers it."""
        return self.length - 2 * self.pairs - self.queries + 1

    def batch(self, size: int, generator: torch.Generator, pairs: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT where nothing is asked.

        `pairs` shows fewer pairs than the task has, for training from easy to hard.
        """
        shown = pairs or self.pairs
        keys = torch.rand(size, self.keys, generator=generator).argsort(1)[:, :shown]
        values = torch.rand(size, self.values, generator=generator).argsort(1)[:, :shown]
        asked = torch.randint(shown, (size, self.queries), generator=generator)
        tokens = torch.full((size, self.length), self.vocab - 1)
        tokens[:, 0 : 2 * shown : 2] = keys
        tokens[:, 1 : 2 * shown : 2] = values + self.keys
        tokens[:, -self.queries :] = keys.gather(1, asked)
        targets = torch.full((size, self.length), SILENT)
        targets[:, -self.queries :] = values.gather(1, asked) + self.keys
        return tokens, targets


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of asked positions whose greatest logit is the target; (batch, length, vocab), (batch, length)."""
    asked = targets != SILENT
    return float((logits.argmax(-1)[asked] == targets[asked]).float().mean())
