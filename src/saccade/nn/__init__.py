"""Layers made from mechanisms."""

from saccade.nn import convert, distil
from saccade.nn.attention import Attention
from saccade.nn.beam import beam_search
from saccade.nn.bridge import GeometryBias, PointBridge, key_points
from saccade.nn.complex import ComplexAttention
from saccade.nn.conv import GatedConv, SpanConvAttention
from saccade.nn.dcal import DCAL, PairBlock, attention_rollout
from saccade.nn.delayed import DelayedAttention, DelayedState
from saccade.nn.diffusion import MaskedDiffusion
from saccade.nn.distil import Linearized, linearize
from saccade.nn.ema import DampedEMA
from saccade.nn.eviction import Eviction, Fifo, KeyValueMemory, LeastFrequent, LeastRecent
from saccade.nn.experts import ExpertState, GraphExperts, SparseExperts, route_flips
from saccade.nn.focused import FocusedAttention, crossbatch
from saccade.nn.fusion import ShallowFusion
from saccade.nn.gates import CBAM, ChannelGate, SentenceGate, SpatialGate
from saccade.nn.gaussian import GaussianGate
from saccade.nn.gin import GINAdapter, GINAttention, add_gin_adapters
from saccade.nn.graphs import MPNN, LinearVirtualNode, VirtualNodeLayer
from saccade.nn.head_scale import choose_head_scale, head_scales, tune_head_scales
from saccade.nn.hymba import Hymba, HymbaMixer, HymbaState, SelectiveHeads
from saccade.nn.labels import LabelAttention
from saccade.nn.lexicon import LexiconAttention
from saccade.nn.linearized import LinearizedAttention, LinearizedTransformer
from saccade.nn.mega import Mega, MegaState
from saccade.nn.memory import MemoryState, NeuralMemory, NeuralMemoryState, neural_memory
from saccade.nn.monotonic import MonotonicLocation, MonotonicSeq2Seq
from saccade.nn.mosa import MoSA, MoSAState
from saccade.nn.multi_source import MultiSourceAttention
from saccade.nn.mvpformer import MVPFormer
from saccade.nn.path import PathAttention, PathState, path_attention
from saccade.nn.pervasive import GridState, PervasiveAttention
from saccade.nn.pointer import PointerNetwork
from saccade.nn.points import PointMatcher, PPFAttention
from saccade.nn.positional import PositionalAttention, PositionalBlock
from saccade.nn.positions import LearnedPositions, SinusoidalPositions
from saccade.nn.prototypes import PrototypeAttention, prototypes
from saccade.nn.regions import RegionRouting
from saccade.nn.relational import DualAttention, RelationalAttention
from saccade.nn.residual_attention import ResidualAttention, ResidualAttentionNetwork, UpDownMask
from saccade.nn.sets import ISAB, MAB, PMA, SAB, SetTransformer
from saccade.nn.skim import SkimAttention, Skimformer, skimming_mask
from saccade.nn.slot_memory import SlotMemoryAttention, SlotState
from saccade.nn.stack import (
    PushdownAttention,
    PushdownState,
    StackAttention,
    pushdown_stack,
    superposition_stack,
)
from saccade.nn.super_attention import SuperAttention
from saccade.nn.superlinear import SuperlinearAttention, SuperlinearState, superlinear_attention
from saccade.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, PersistentAttention, TitansState
from saccade.nn.transformer import Encoder, EncoderDecoder, Transformer
from saccade.nn.variational import Readout, VariationalAttention

__all__ = [
    "CBAM",
    "DCAL",
    "ISAB",
    "MAB",
    "MPNN",
    "PMA",
    "SAB",
    "Attention",
    "ChannelGate",
    "ComplexAttention",
    "DampedEMA",
    "DelayedAttention",
    "DelayedState",
    "DualAttention",
    "Encoder",
    "EncoderDecoder",
    "Eviction",
    "ExpertState",
    "Fifo",
    "FocusedAttention",
    "GINAdapter",
    "GINAttention",
    "GatedConv",
    "GaussianGate",
    "GeometryBias",
    "GraphExperts",
    "GridState",
    "Hymba",
    "HymbaMixer",
    "HymbaState",
    "KeyValueMemory",
    "LabelAttention",
    "LearnedPositions",
    "LeastFrequent",
    "LeastRecent",
    "LexiconAttention",
    "LinearVirtualNode",
    "Linearized",
    "LinearizedAttention",
    "LinearizedTransformer",
    "MVPFormer",
    "MaskedDiffusion",
    "Mega",
    "MegaState",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryState",
    "MoSA",
    "MoSAState",
    "MonotonicLocation",
    "MonotonicSeq2Seq",
    "MultiSourceAttention",
    "NeuralMemory",
    "NeuralMemoryState",
    "PPFAttention",
    "PairBlock",
    "PathAttention",
    "PathState",
    "PersistentAttention",
    "PervasiveAttention",
    "PointBridge",
    "PointMatcher",
    "PointerNetwork",
    "PositionalAttention",
    "PositionalBlock",
    "PrototypeAttention",
    "PushdownAttention",
    "PushdownState",
    "Readout",
    "RegionRouting",
    "RelationalAttention",
    "ResidualAttention",
    "ResidualAttentionNetwork",
    "SelectiveHeads",
    "SentenceGate",
    "SetTransformer",
    "ShallowFusion",
    "SinusoidalPositions",
    "SkimAttention",
    "Skimformer",
    "SlotMemoryAttention",
    "SlotState",
    "SpanConvAttention",
    "SparseExperts",
    "SpatialGate",
    "StackAttention",
    "SuperAttention",
    "SuperlinearAttention",
    "SuperlinearState",
    "TitansState",
    "Transformer",
    "UpDownMask",
    "VariationalAttention",
    "VirtualNodeLayer",
    "add_gin_adapters",
    "attention_rollout",
    "beam_search",
    "choose_head_scale",
    "convert",
    "crossbatch",
    "distil",
    "head_scales",
    "key_points",
    "linearize",
    "neural_memory",
    "path_attention",
    "prototypes",
    "pushdown_stack",
    "route_flips",
    "skimming_mask",
    "superlinear_attention",
    "superposition_stack",
    "tune_head_scales",
]
