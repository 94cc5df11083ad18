"""Attention as a recurrence: one learned query a head reads every prefix."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.heads import LearnedQuery
from saccade.parts.mask import Causal


@system("aaren", ref="S177")
def aaren() -> Pairwise:
    """out_i is softmax attention of a learned query over keys 0..i, constant state a token (Feng et al., Attention as an RNN, 2024)."""
    return Pairwise(heads=LearnedQuery(), pairs=Causal())
