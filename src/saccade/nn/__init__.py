"""Layers made from mechanisms."""

from saccade.nn.attention import Attention
from saccade.nn.positions import LearnedPositions, SinusoidalPositions
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = [
    "Attention",
    "Encoder",
    "EncoderDecoder",
    "LearnedPositions",
    "SinusoidalPositions",
    "Transformer",
]
