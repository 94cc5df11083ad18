"""Tuning the temperatures of `head_scale` alone, for texts longer than those of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def head_scales(model: nn.Module) -> list[nn.Parameter]:
    """The logarithms of the temperatures of every layer, (heads,) each. Raises ValueError where there are none."""
    found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "head_scale"]
    if not found:
        raise ValueError("the model has no head_scale: build it with a mechanism such as nope_head_scale")
    return found


def tune_head_scales(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss, rate: float = 0.05
) -> list[float]:
    """Train the temperatures alone on batches (tokens, targets) of the target length: the losses, one a batch.

    Everything else is frozen meanwhile. (Wang et al., Length Generalization without Position Encoding, 2024.)
    """
    scales = head_scales(model)
    asked = {p: p.requires_grad for p in model.parameters()}
    optimizer, losses = torch.optim.Adam(scales, lr=rate), []
    try:
        for p in asked:
            p.requires_grad_(False)
        for p in scales:
            p.requires_grad_(True)
        for tokens, targets in batches:
            value = loss(model, tokens, targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
    finally:
        for p, on in asked.items():
            p.requires_grad_(on)
            p.grad = None
    return losses


@torch.no_grad()
def choose_head_scale(
    model: nn.Module, tokens: Tensor, targets: Tensor, loss: Loss, candidates: Sequence[float]
) -> float:
    """Set one temperature for all heads: the candidate of the least loss, which is returned."""
    if not candidates or min(candidates) <= 0:
        raise ValueError(f"candidates must be temperatures above 0, got {list(candidates)}")
    scales = head_scales(model)

    def tried(scale: float) -> float:
        for p in scales:
            p.fill_(scale).log_()
        return float(loss(model, tokens, targets))

    best = min(candidates, key=tried)
    tried(best)
    return best
