"""Layers made from mechanisms."""

from saccade.nn import convert
from saccade.nn.attention import Attention
from saccade.nn.gates import CBAM, ChannelGate, SentenceGate, SpatialGate
from saccade.nn.gaussian import GaussianGate
from saccade.nn.positions import LearnedPositions, SinusoidalPositions
from saccade.nn.regions import RegionRouting
from saccade.nn.residual_attention import ResidualAttention, ResidualAttentionNetwork, UpDownMask
from saccade.nn.sets import ISAB, MAB, PMA, SAB, SetTransformer
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = [
    "CBAM",
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "Attention",
    "ChannelGate",
    "Encoder",
    "EncoderDecoder",
    "GaussianGate",
    "LearnedPositions",
    "RegionRouting",
    "ResidualAttention",
    "ResidualAttentionNetwork",
    "SentenceGate",
    "SetTransformer",
    "SinusoidalPositions",
    "SpatialGate",
    "Transformer",
    "UpDownMask",
    "convert",
]
