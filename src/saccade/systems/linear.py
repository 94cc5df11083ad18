"""Attention in linear time: states and projections in place of all pairs."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, Recurrent, system
from saccade.parts.base import register
from saccade.parts.feature import Elu1, Favor, LengthScaled, SoftmaxFeature
from saccade.parts.memory import ChannelRatio, RowRatio
from saccade.parts.summary import LengthProject


def linear() -> Recurrent:
    """phi(x) = elu(x) + 1, normalised by row (Katharopoulos et al., Transformers are RNNs, 2020)."""
    return Recurrent(feature=Elu1(), ratio=RowRatio())


register("linear", linear)


@system("performer_favor", ref="S187")
def performer_favor(features: int = 64, rows: str = "orthogonal") -> Recurrent:
    """Positive random features that estimate the softmax kernel (Choromanski et al., Performers, 2021)."""
    return Recurrent(feature=Favor(features, rows), ratio=RowRatio())


@system("linformer", ref="S236")
def linformer(rank: int = 64, length: int = 512) -> Pairwise:
    """Softmax over `rank` learned mixtures of at most `length` keys; bidirectional (Wang et al., Linformer, 2020)."""
    return Pairwise(summary=LengthProject(rank, length))


@system("efficient_attention", ref="S192")
def efficient_attention(normalizer: str = "softmax") -> Recurrent:
    """softmax over channels of q times (softmax over tokens of k)^T v, or q (k^T v) / n with `scaling`; bidirectional.

    (Shen et al., Efficient Attention, 2021.)
    """
    if normalizer == "softmax":
        return Recurrent(feature=SoftmaxFeature(), ratio=ChannelRatio())
    if normalizer == "scaling":
        return Recurrent(feature=LengthScaled())
    raise MechanismError(
        f"efficient_attention: normalizer must be one of softmax, scaling, got {normalizer!r}"
    )
