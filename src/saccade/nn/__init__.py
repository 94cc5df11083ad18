"""Layers made from mechanisms."""

from saccade.nn import convert
from saccade.nn.attention import Attention
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = ["Attention", "Encoder", "EncoderDecoder", "Transformer", "convert"]
