"""Softmax attention as first published, and the same mathematics in tiles."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.tiles import Tiles


@system("transformer", ref="S077")
def transformer() -> Pairwise:
    """softmax(q.k / sqrt(d)) v over all keys (Vaswani et al., Attention Is All You Need, 2017)."""
    return Pairwise()


@system("memory_efficient_attention", ref="S135")
def memory_efficient_attention(query_chunk: int = 128, key_chunk: int = 512) -> Pairwise:
    """The same result in tiles with a running maximum and sum (Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, 2021)."""
    return Pairwise(tiles=Tiles(query_chunk, key_chunk))
