"""Softmax attention that knows where its tokens stand."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.count import ContextCount
from saccade.parts.mask import Causal
from saccade.parts.relative import RelTable, RelValue


@system("shaw_rpr", ref="S248")
def shaw_rpr(clip: int = 16) -> Pairwise:
    """softmax(q.(k + a[clip(j - i)])) mixing v + b[clip(j - i)], both tables shared by all heads.

    (Shaw et al., Self-Attention with Relative Position Representations, 2018.)
    """
    return Pairwise(logits=(RelTable(clip),), value=(RelValue(clip),))


@system("cope_contextual", ref="S143")
def cope_contextual(most: int = 16) -> Pairwise:
    """Causal attention whose distances count tokens that a gate of query and key lets through.

    (Golovneva et al., Contextual Position Encoding: Learning to Count What's Important, 2024.)
    """
    return Pairwise(pairs=Causal(), logits=(ContextCount(most),))
