"""Blocks of keys chosen by the query."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.mask import Causal, Chunk
from saccade.parts.proxy import MeanKey
from saccade.parts.select import TopBlocks


@system("moba", ref="S211")
def moba(block: int = 64, top: int = 4) -> Pairwise:
    """Every query reads its own block and the `top` past blocks whose mean key scores highest (Lu et al., MoBA, 2025)."""
    return Pairwise(pairs=Causal() & (TopBlocks(block, top, MeanKey()) | Chunk(block)))
