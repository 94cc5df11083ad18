"""Balanced brackets of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


@dataclass(frozen=True)
class Dyck:
    """Balanced strings of `length` brackets of `kinds` kinds, at most `depth` open at once, all such strings alike likely.

    Where a closing bracket comes next, its kind is asked (Hewitt et al., RNNs can generate bounded hierarchical languages
    with optimal memory, 2020); `depths` is another target. The metric is `recall.accuracy`.
    """

    length: int = 40
    kinds: int = 2
    depth: int = 8

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise ValueError(f"balanced brackets need an even length of at least 2, got {self.length}")
        if self.kinds < 1 or self.depth < 1:
            raise ValueError(
                f"dyck needs at least one kind and depth 1, got {self.kinds} kinds and depth {self.depth}"
            )

    @property
    def vocab(self) -> int:
        """Opening brackets of each kind, then closing ones."""
        return 2 * self.kinds

    @property
    def chance(self) -> float:
        """Accuracy of a guess that knows that a bracket closes."""
        return 1 / self.kinds

    @property
    def baseline(self) -> float:
        """Accuracy of closing the kind of the last bracket: right after an opening one, a guess after a closing one."""
        at = torch.zeros(self.depth + 1, dtype=torch.float64)
        at[0], peaks = 1.0, 0.0
        for left in range(self.length, 1, -1):
            opened, closed = at * self.opens[left], at * (1 - self.opens[left])
            peaks += float((opened[:-1] * (1 - self.opens[left - 1, 1:])).sum())
            at = torch.zeros_like(at)
            at[1:] += opened[:-1]
            at[:-1] += closed[1:]
        share = peaks / (self.length / 2)
        return share + (1 - share) / self.kinds

    @cached_property
    def opens(self) -> Tensor:
        """The odds (length + 1, depth + 1) that the next bracket opens, by brackets left and brackets open.

        Uniform over strings: the share of the ways to the end that begin with an opening bracket.
        """
        odds = torch.zeros(self.length + 1, self.depth + 1, dtype=torch.float64)
        ways = torch.zeros(self.depth + 3, dtype=torch.float64)  # with one place below 0, one above depth
        ways[1] = 1
        for left in range(1, self.length + 1):
            opening, closing = ways[2:], ways[:-2]
            ways = torch.cat((ways.new_zeros(1), opening + closing, ways.new_zeros(1)))
            odds[left] = (opening / ways[1:-1]).nan_to_num(0.0)
            ways = ways / ways.sum()
        return odds

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (size, length) int64; targets are SILENT where no closing bracket comes next."""
        draw = torch.rand(size, self.length, generator=generator, dtype=torch.float64)
        kind = torch.randint(self.kinds, (size, self.length), generator=generator)
        stack, rows = torch.zeros(size, self.depth + 1, dtype=torch.long), torch.arange(size)
        height = torch.zeros(size, dtype=torch.long)
        tokens = torch.empty(size, self.length, dtype=torch.long)
        for at in range(self.length):
            opening = draw[:, at] < self.opens[self.length - at, height]
            height = height + opening.long()
            stack[rows, height] = torch.where(opening, kind[:, at], stack[rows, height])
            tokens[:, at] = stack[rows, height] + self.kinds * (~opening).long()
            height = height - (~opening).long()
        following = torch.cat((tokens[:, 1:], torch.zeros(size, 1, dtype=torch.long)), 1)
        return tokens, following.masked_fill(following < self.kinds, SILENT)

    def depths(self, tokens: Tensor) -> Tensor:
        """How many brackets are open after each token, in the shape of tokens."""
        return torch.where(tokens < self.kinds, 1, -1).cumsum(-1)

    def balanced(self, tokens: Tensor) -> Tensor:
        """Whether each row (size, length) is balanced, of any depth: (size,) bool."""
        return torch.tensor([self._balanced(row) for row in tokens.tolist()])

    def _balanced(self, row: list[int]) -> bool:
        stack: list[int] = []
        for token in row:
            if token < self.kinds:
                stack.append(token)
            elif not stack or stack.pop() != token - self.kinds:
                return False
        return not stack
