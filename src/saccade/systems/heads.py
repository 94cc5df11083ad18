"""Query heads that share keys and values, or take them from the input as it is."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.heads import SLICE, GroupedQuery, Sources


@system("gqa", ref="S193")
def gqa(kv: int = 2) -> Pairwise:
    """Query head h of H reads key-value head floor(h kv / H) (Ainslie et al., GQA, 2023)."""
    return Pairwise(heads=GroupedQuery(kv))


@system("mqa", ref="S115")
def mqa() -> Pairwise:
    """All query heads read one key-value head (Shazeer, Fast Transformer Decoding, 2019)."""
    return Pairwise(heads=GroupedQuery(1))


@system("optimised_attention", ref="S114")
def optimised_attention(form: str = "optimised") -> Pairwise:
    """Values that are slices of the input, so that a layer has 3 projections; `efficient`, for one head: keys too, so 2.

    `saccade.nn.SuperAttention` is the efficient form with values aligned by a learned matrix. (Hosseini and Hosseini, You
    Need to Pay Better Attention, 2024.)
    """
    forms = {"optimised": Sources(v=SLICE), "efficient": Sources(k=SLICE, v=SLICE)}
    if form not in forms:
        raise MechanismError(f"optimised_attention: form must be one of {', '.join(forms)}, got {form!r}")
    return Pairwise(heads=forms[form])
