"""Flip-flop language: write a bit, ignore bits, read back what was written last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT

WRITE, IGNORE, READ = 2, 3, 4


@dataclass(frozen=True)
class FlipFlop:
    """Instructions, each followed by a bit; the bit after a read is the one written last. `length` tokens in all.

    The first instruction writes and the last reads; the others ignore with probability `ignore`, else write or read
    alike (Liu et al., Exposing Attention Glitches with Flip-Flop Language Modeling, 2023). The model must be causal,
    since the bit follows its question. The metric is `recall.accuracy`.
    """

    length: int = 64
    ignore: float = 0.8

    def __post_init__(self) -> None:
        if self.length < 4 or self.length % 2:
            raise ValueError(f"flip-flop needs an even length of at least 4 tokens, got {self.length}")
        if not 0 <= self.ignore <= 1:
            raise ValueError(f"flip-flop ignores with a probability of 0 to 1, got {self.ignore}")

    @property
    def vocab(self) -> int:
        """Two bits, three instructions."""
        return 5

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 0.5

    @property
    def baseline(self) -> float:
        """Accuracy of the last bit before the read, which is a coin when it was ignored."""
        between = self.length // 2 - 2
        reads = between * (1 - self.ignore) / 2 + 1
        after_the_first = 1.0 if between == 0 else (1 - self.ignore) / 2
        return 1 - (reads - after_the_first) * self.ignore / 2 / reads

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT except where a read is the last token."""
        count = self.length // 2
        draw = torch.rand(size, count, generator=generator)
        instruction = torch.where(
            draw < self.ignore, IGNORE, torch.where(draw < (1 + self.ignore) / 2, WRITE, READ)
        )
        instruction[:, 0], instruction[:, -1] = WRITE, READ
        bits = torch.randint(2, (size, count), generator=generator)
        written = torch.where(instruction == WRITE, torch.arange(count), 0).cummax(1).values
        bits = torch.where(instruction == READ, bits.gather(1, written), bits)
        targets = torch.where(instruction == READ, bits, SILENT)
        silent = torch.full_like(targets, SILENT)
        return torch.stack((instruction, bits), 2).flatten(1), torch.stack((targets, silent), 2).flatten(1)
