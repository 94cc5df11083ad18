"""Attention whose weights are the answer."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.score import Additive


@system("pointer_network", ref="S132")
def pointer_network(hidden: int = 64) -> Pairwise:
    """Softmax over v.tanh(W1 e + W2 d), as the probability of each position (Vinyals, Fortunato and Jaitly, Pointer Networks, 2015).

    `need=("weights",)` gives the probabilities, `mask` excludes positions that were visited; `saccade.nn.PointerNetwork`
    is the whole network.
    """
    return Pairwise(score=Additive(hidden))
