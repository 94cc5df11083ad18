"""Attention in linear time: states and projections in place of all pairs."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, Recurrent, system
from saccade.parts.base import register
from saccade.parts.decay import ChannelDecay, FixedDecay, StepDecay
from saccade.parts.feature import CosineFeature, Elu1, Favor, LengthScaled, SoftmaxFeature, Taylor
from saccade.parts.mask import Causal
from saccade.parts.memory import ChannelRatio, RowRatio, SignedRatio
from saccade.parts.output import OutNorm
from saccade.parts.summary import LengthProject
from saccade.parts.tokens import Standardize, Unit
from saccade.parts.write import Delta, StepWrite


def linear() -> Recurrent:
    """phi(x) = elu(x) + 1, normalised by row (Katharopoulos et al., Transformers are RNNs, 2020)."""
    return Recurrent(feature=Elu1(), ratio=RowRatio())


def cosformer(length: int = 1024) -> Recurrent:
    """relu(q).relu(k) cos(pi (i - j) / (2 length)), normalised by row, for at most `length` tokens (Qin et al., cosFormer, 2022)."""
    return Recurrent(feature=CosineFeature(length), ratio=RowRatio())


def retention(first: float = 5.0) -> Recurrent:
    """q k^T decayed by a fixed rate a head, each head's output normalised (Sun et al., Retentive Network, 2023)."""
    return Recurrent(pairs=Causal(), decay=FixedDecay(first), output=(OutNorm(),))


def gla(temperature: float = 16.0) -> Recurrent:
    """A gate for every channel of the key forgets; normalised output (Yang et al., Gated Linear Attention, 2024)."""
    return Recurrent(pairs=Causal(), decay=ChannelDecay(temperature), output=(OutNorm(),))


def delta_net() -> Recurrent:
    """Keys of length one overwrite what they held (Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024)."""
    return Recurrent(tokens=(Unit(),), pairs=Causal(), write=Delta(), output=(OutNorm(),))


def gated_delta_net() -> Recurrent:
    """The delta rule on a state that each token's step lets fade (Yang et al., Gated Delta Networks, 2025)."""
    return Recurrent(tokens=(Unit(),), pairs=Causal(), decay=StepDecay(), write=Delta(), output=(OutNorm(),))


def mamba2() -> Recurrent:
    """One step a token and head both forgets and writes (Dao and Gu, Transformers are SSMs, 2024)."""
    return Recurrent(pairs=Causal(), decay=StepDecay(), write=StepWrite(), output=(OutNorm(),))


for maker in (linear, cosformer, retention, gla, delta_net, gated_delta_net, mamba2):
    register(maker.__name__, maker)


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


@system("fastmax", ref="S131")
def fastmax(order: int = 2, floor: float = 0.01) -> Recurrent:
    """Weights 1 + s, and + s^2 / 2 in second order, s the product of standardised q and k, divided by their sum.

    First-order weights may be negative and cancel: their sum then counts as at least `floor` in size. (Gerami et al., FAST:
    Factorizable Attention for Speeding up Transformers, 2024.)
    """
    ratio = RowRatio() if order == 2 else SignedRatio(floor)
    return Recurrent(tokens=(Standardize(),), feature=Taylor(order, scale=1.0), ratio=ratio)
