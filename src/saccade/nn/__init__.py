"""Layers made from mechanisms."""

from saccade.nn.attention import Attention
from saccade.nn.pointer import PointerNetwork
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = ["Attention", "Encoder", "EncoderDecoder", "PointerNetwork", "Transformer"]
