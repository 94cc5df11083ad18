"""Keys of the chunks of text that fit a query's chunk best; a small net cuts the text."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.mask import Causal
from saccade.parts.spread import TopChunks


@system("dhsa", ref="S280")
def dhsa(
    top: int = 64,
    window: int = 8,
    gap: int = 4,
    hidden: int = 16,
    every: int | None = None,
    past: bool = False,
) -> Pairwise:
    """Every query reads the `top` keys of the chunks that its own chunk scores highest, itself among the candidates.

    The choice reads ahead, for prefill: the mechanism says `leak`. `past=true` chooses from the past alone, alike in training and in decoding.
    (Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, 2025.)
    """
    return Pairwise(pairs=Causal() & TopChunks(top, window, gap, hidden, every, past))
