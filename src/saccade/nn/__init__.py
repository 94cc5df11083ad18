"""Layers made from mechanisms."""

from saccade.nn import convert
from saccade.nn.attention import Attention
from saccade.nn.gates import CBAM, ChannelGate, SentenceGate, SpatialGate
from saccade.nn.gaussian import GaussianGate
from saccade.nn.labels import LabelAttention
from saccade.nn.lexicon import LexiconAttention
from saccade.nn.positions import LearnedPositions, SinusoidalPositions
from saccade.nn.relational import DualAttention, RelationalAttention
from saccade.nn.residual_attention import ResidualAttention, ResidualAttentionNetwork, UpDownMask
from saccade.nn.sets import ISAB, MAB, PMA, SAB, SetTransformer
from saccade.nn.super_attention import SuperAttention
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = [
    "CBAM",
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "Attention",
    "ChannelGate",
    "DualAttention",
    "Encoder",
    "EncoderDecoder",
    "GaussianGate",
    "LabelAttention",
    "LearnedPositions",
    "LexiconAttention",
    "RelationalAttention",
    "ResidualAttention",
    "ResidualAttentionNetwork",
    "SentenceGate",
    "SetTransformer",
    "SinusoidalPositions",
    "SpatialGate",
    "SuperAttention",
    "Transformer",
    "UpDownMask",
    "convert",
]
