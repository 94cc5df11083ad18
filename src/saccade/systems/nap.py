"""Rows of logits brought to a mean and a deviation in place of a probability."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.pointwise import RowStandard


@system("nap", ref="S213")
def nap() -> Pairwise:
    """Weights gain (s - mean) / deviation + bias of a row (Richter and Wattenhofer, Normalized Attention Without Probability Cage, 2020)."""
    return Pairwise(normalizer=RowStandard())
