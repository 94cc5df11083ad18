"""Query heads that share keys and values."""

from __future__ import annotations

from saccade.mechanism import Pairwise, system
from saccade.parts.heads import GroupedQuery


@system("gqa", ref="S193")
def gqa(kv: int = 2) -> Pairwise:
    """Query head h of H reads key-value head floor(h kv / H) (Ainslie et al., GQA, 2023)."""
    return Pairwise(heads=GroupedQuery(kv))


@system("mqa", ref="S115")
def mqa() -> Pairwise:
    """All query heads read one key-value head (Shazeer, Fast Transformer Decoding, 2019)."""
    return Pairwise(heads=GroupedQuery(1))
