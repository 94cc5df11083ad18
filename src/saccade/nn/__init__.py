"""Layers made from mechanisms."""

from saccade.nn.attention import Attention
from saccade.nn.complex import ComplexAttention
from saccade.nn.head_scale import choose_head_scale, head_scales, tune_head_scales
from saccade.nn.monotonic import MonotonicLocation, MonotonicSeq2Seq
from saccade.nn.mvpformer import MVPFormer
from saccade.nn.path import PathAttention, PathState, path_attention
from saccade.nn.points import PointMatcher, PPFAttention
from saccade.nn.positional import PositionalAttention, PositionalBlock
from saccade.nn.positions import LearnedPositions, SinusoidalPositions
from saccade.nn.skim import SkimAttention, Skimformer, skimming_mask
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer

__all__ = [
    "Attention",
    "ComplexAttention",
    "Encoder",
    "EncoderDecoder",
    "LearnedPositions",
    "MVPFormer",
    "MonotonicLocation",
    "MonotonicSeq2Seq",
    "PPFAttention",
    "PathAttention",
    "PathState",
    "PointMatcher",
    "PositionalAttention",
    "PositionalBlock",
    "SinusoidalPositions",
    "SkimAttention",
    "Skimformer",
    "Transformer",
    "choose_head_scale",
    "head_scales",
    "path_attention",
    "skimming_mask",
    "tune_head_scales",
]
