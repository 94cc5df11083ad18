"""Near-linear attention: sorted hashes find large weights, sampled keys stand for the small ones."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.sortlsh import SortLSH


@system("hyperattention", ref="S235")
def hyperattention(block: int = 64, samples: int = 64, base: int = 256, seed: int = 0) -> Pairwise:
    """Softmax over the keys of a query's bucket in hash order and over `samples` weighted others (Han et al., HyperAttention, 2023).

    `causal + hyperattention` splits the sequence in halves again and again, down to runs of `base` tokens, which are exact.
    """
    return Pairwise(pairs=SortLSH(block, samples, base, seed=seed))
