"""Softmax attention that knows where its tokens stand."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.relative import RelTable, RelValue


@system("shaw_rpr", ref="S248")
def shaw_rpr(clip: int = 16) -> Pairwise:
    """softmax(q.(k + a[clip(j - i)])) mixing v + b[clip(j - i)], both tables shared by all heads.

    (Shaw et al., Self-Attention with Relative Position Representations, 2018.)
    """
    return Pairwise(logits=(RelTable(clip),), value=(RelValue(clip),))
