"""The value that stands with the least key of a set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saccade.tasks.odds import top_share


@dataclass(frozen=True)
class ArgMin:
    """A set of `items`, each a key uniform on [0, 1) and a value; the answer is the value of the least key.

    Nothing is asked for, unlike in `NearestKey`: the items are held against each other. The metric is `recall.accuracy`.
    """

    items: int = 12
    values: int = 5

    def __post_init__(self) -> None:
        if self.items < 1 or self.values < 2:
            raise ValueError(
                f"argmin needs at least one item and 2 values, got {self.items} items and {self.values} values"
            )

    @property
    def width(self) -> int:
        """Channels of an item: its key, then its value one-hot."""
        return 1 + self.values

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all values."""
        return 1 / self.values

    @property
    def baseline(self) -> float:
        """Accuracy of the most frequent value of the set."""
        return top_share(self.items, self.values)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Items (size, items, width) float32 and answers (size,) int64."""
        keys = torch.rand(size, self.items, 1, generator=generator)
        values = torch.randint(self.values, (size, self.items), generator=generator)
        items = torch.cat((keys, one_hot(values, self.values).float()), 2)
        return items, values.gather(1, keys.argmin(1))[:, 0]
