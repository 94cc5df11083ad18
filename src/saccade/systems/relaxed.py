"""Softmax weights relaxed towards the uniform ones."""

from __future__ import annotations

import torch

from saccade.errors import MechanismError
from saccade.mechanism import Mechanism, Mix, Pairwise, system
from saccade.mechanism import causal as causal_form
from saccade.parts.score import Uniform


@system("relaxed_attention", ref="S030")
def relaxed_attention(amount: float = 0.1, causal: bool = False) -> Mechanism:
    """Weights (1 - amount) A + amount / T over the T keys of a row (Lohrenz et al., Relaxed Attention for Transformer Models, 2022).

    Runs as two outputs, attention and the mean of values, and holds no weights. It is meant for training; the plain
    mechanism has the same parameters and takes over at inference.
    """
    if not 0 <= amount <= 1:
        raise MechanismError(f"relaxed_attention: amount must lie in 0..1, got {amount}")
    members = (Pairwise(), Pairwise(score=Uniform()))
    mixed = Mix(members, shares=(1 - amount, amount))
    return causal_form(mixed) if causal else mixed


def fuzzy(amount: float, deviation: float, generator: torch.Generator, causal: bool = False) -> Mechanism:
    """Relaxed attention for one training step: its amount is drawn from N(amount, deviation) and cut to 0..1.

    A layer takes it as `layer.mechanism = fuzzy(...)`; its parameters stay the same.
    """
    if deviation < 0:
        raise MechanismError(f"fuzzy: deviation must be at least 0, got {deviation}")
    drawn = amount + deviation * float(torch.randn((), generator=generator))
    return relaxed_attention(min(1.0, max(0.0, drawn)), causal)
