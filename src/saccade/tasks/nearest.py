"""Values at places on a line: one place is asked again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saccade.tasks.odds import top_share


@dataclass(frozen=True)
class NearestKey:
    """`keys` different points of an even grid on [-1, 1], each with a value; the query is one of the points.

    Its value is the answer. A key is one number, so what tells keys apart is distance, to the query and not among them as in
    `ArgMin`. The metric is `recall.accuracy`.
    """

    keys: int = 6
    grid: int = 9
    values: int = 4

    def __post_init__(self) -> None:
        if self.grid < 2 or not 1 <= self.keys <= self.grid or self.values < 2:
            raise ValueError(
                f"nearest key needs a grid of at least 2 points, 1 to {self.grid} keys and at least 2 values, got grid "
                f"{self.grid}, {self.keys} keys and {self.values} values"
            )

    @property
    def width(self) -> int:
        """Channels of a token: its place, then its value one-hot."""
        return 1 + self.values

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all values."""
        return 1 / self.values

    @property
    def baseline(self) -> float:
        """Accuracy of the most frequent value of the row."""
        return top_share(self.keys, self.values)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (size, keys + 1, width) float32, the last the query with no value, and the answers (size,) int64."""
        place = torch.rand(size, self.grid, generator=generator).argsort(1)[:, : self.keys]
        value = torch.randint(self.values, (size, self.keys), generator=generator)
        asked = torch.randint(self.keys, (size, 1), generator=generator)
        tokens = torch.zeros(size, self.keys + 1, self.width)
        tokens[:, :, 0] = torch.cat((place, place.gather(1, asked)), 1) * (2 / (self.grid - 1)) - 1
        tokens[:, :-1, 1:] = one_hot(value, self.values).float()
        return tokens, value.gather(1, asked)[:, 0]
