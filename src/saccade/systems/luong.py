"""Luong attention: three scores, global or local."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.algebra import Full, Pairs
from saccade.parts.mask import Neighborhood
from saccade.parts.reweight import GaussGate, Reweight
from saccade.parts.score import Additive, Bilinear, Dot, Score
from saccade.parts.select import CentredSpan

SCORES: dict[str, Score] = {"dot": Dot(scale=1.0), "general": Bilinear(), "concat": Additive()}


@system("luong_attention", ref="S139")
def luong_attention(score: str = "general", local: str = "global", half: int = 8) -> Pairwise:
    """Scores q.k, q W k or v.tanh(Wq q + Wk k), over all keys or those within `half` of a centre.

    `monotonic` centres on the query's own position; `predictive` on a position that the layer predicts, with weights
    times a Gaussian of deviation half/2 that is not renormalised. (Luong et al., Effective Approaches to Attention-based
    Neural Machine Translation, 2015.)
    """
    if score not in SCORES:
        raise MechanismError(f"luong_attention: score must be one of {', '.join(SCORES)}, got {score!r}")
    shapes: dict[str, tuple[Pairs, tuple[Reweight, ...]]] = {
        "global": (Full(), ()),
        "monotonic": (Neighborhood(2 * half + 1), ()),
        "predictive": (CentredSpan(half), (GaussGate(max(1, half)),)),
    }
    if local not in shapes:
        raise MechanismError(f"luong_attention: local must be one of {', '.join(shapes)}, got {local!r}")
    pairs, reweight = shapes[local]
    return Pairwise(pairs=pairs, score=SCORES[score], reweight=reweight)
