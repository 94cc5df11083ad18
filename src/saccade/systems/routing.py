"""Half of the heads local, half in buckets of tokens that share a centroid."""

from __future__ import annotations

from saccade.mechanism import ByHead, Pairwise, system
from saccade.parts.bucket import CentroidBuckets
from saccade.parts.mask import Causal, Window
from saccade.parts.tokens import Standardize


@system("routing_transformer", ref="S194")
def routing_transformer(
    clusters: int = 8, width: int | None = None, window: int = 64, local: bool = True
) -> ByHead | Pairwise:
    """Each centroid takes its best `width` tokens and attends among them; the other heads read a window.

    `local=false` routes all heads. Membership reads the whole sequence in training: the mechanism says `leak`.
    (Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, 2020.)
    """
    routed = Pairwise(tokens=(Standardize(),), pairs=Causal() & CentroidBuckets(clusters, width))
    return ByHead((Pairwise(pairs=Window(window)), routed)) if local else routed
