"""What the tests of tasks share: seeded draws, a plain solver row by row, a strategy's accuracy with its error bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from saccade.tasks.recall import SILENT


class Task(Protocol):
    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_row(strategy: Callable[[list, list], list | int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A strategy written for one row of plain numbers, run on a batch."""

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor([strategy(x, y) for x, y in zip(inputs.tolist(), targets.tolist(), strict=True)])

    return run


def accuracy(
    task: Task, strategy: Callable[[Tensor, Tensor], Tensor], size: int = 200, seed: int = 0
) -> float:
    """The share of asked places where strategy(inputs, targets) finds the target."""
    inputs, targets = task.batch(size, seeded(seed))
    asked = targets != SILENT
    assert asked.any()
    return float((strategy(inputs, targets) == targets)[asked].float().mean())


def agrees(
    expected: float, task: Task, strategy: Callable[[Tensor, Tensor], Tensor], size: int = 500
) -> bool:
    """Whether the strategy scores what is expected within four standard errors, and those are below 0.01."""
    found = torch.tensor([accuracy(task, strategy, size, seed) for seed in range(16)], dtype=torch.float64)
    error = float(found.std()) / 4
    assert error < 0.01, f"the simulation is too coarse: {error:.4f}"
    assert abs(float(found.mean()) - expected) < 4 * error + 1e-7, f"{found.mean():.4f} is not {expected:.4f}"
    return True


def repeatable(task: Task) -> bool:
    """Whether the same seed gives the same batch, and another seed another."""
    one, two, other = (task.batch(64, seeded(seed)) for seed in (3, 3, 4))
    return all(map(torch.equal, one, two)) and not any(map(torch.equal, one, other))
