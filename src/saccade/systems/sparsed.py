"""Blocks chosen once by the attention that they get, for every later step of a text that is denoised."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.blockmap import BlockMass
from saccade.parts.budget import Apart, Share
from saccade.parts.select import TopBlocks


@system("sparsed", ref="S285")
def sparsed(block: int = 32, keep: float = 0.3, prompt: int = 0) -> Pairwise:
    """Every block of queries reads the share `keep` of the key blocks with the most attention, those of the prompt apart.

    Choosing takes the whole map once; `nn.MaskedDiffusion.generate` replays the choice in later steps. The first `prompt` keys, whole
    blocks of them, are the prompt. Bidirectional. (Wang et al., SparseD: Sparse Attention for Diffusion Language Models, 2025.)
    """
    share = Share(keep)
    budget = Apart(-(-prompt // block), share) if prompt else share
    return Pairwise(pairs=TopBlocks(block, budget, BlockMass(), rows=block))
