"""Patterns that are fixed by position and head."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Mix, Pairwise, system
from saccade.parts.algebra import Pairs
from saccade.parts.mask import Causal, Neighborhood, Sink, Window
from saccade.parts.output import OutGate
from saccade.parts.pattern import HeadStride, HeadStripes, LocalBlocks, Permuted, PowerBlocks


@system("hepos", ref="S113")
def hepos(stride: int = 4) -> Pairwise:
    """Cross-attention in which head h reads every `stride`-th source token from h mod stride on.

    (Huang et al., Efficient Attentions for Long Document Summarization, 2021.)
    """
    return Pairwise(pairs=HeadStride(stride))


@system("s2_attention", ref="S288")
def s2_attention(
    block: int = 64, local: int = 4, stripes: int = 8, step: int = 1, share: int = 1
) -> Pairwise:
    """The last `local` blocks, and every `stripes`-th block of the past, shifted by `step` blocks from head to head.

    `share` heads in a row read the same: with grouped keys give heads / kv_heads, so that keys that no head reads can be
    freed. (Lin et al., Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads, 2024.)
    """
    return Pairwise(pairs=Causal() & (LocalBlocks(block, local) | HeadStripes(block, stripes, step, share)))


@system("powerattention", ref="S266")
def powerattention(block: int = 64, local: int = 1, sinks: int = 0) -> Pairwise:
    """The last `local` blocks, the blocks 1, 2, 4, 8, ... back, and the first `sinks` blocks.

    (Chen et al., PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, 2025.)
    """
    if not isinstance(sinks, int) or sinks < 0:
        raise MechanismError(f"powerattention: sinks must be a whole number of at least 0, got {sinks}")
    pairs: Pairs = LocalBlocks(block, local) | PowerBlocks(block)
    return Pairwise(pairs=Causal() & (pairs | Sink(sinks * block) if sinks else pairs))


@system("stochastic_attention", ref="S298")
def stochastic_attention(width: int = 65, length: int = 4096, seed: int = 0, causal: bool = True) -> Mix:
    """g times attention in a window of a shuffled order, plus 1 - g times attention in a plain window of as many keys.

    The gate g is a number a head and token. Under `causal` the shuffled window loses its later keys, the plain one looks
    back. Give each layer its own seed. (Stochastic Attention: Connectome-Inspired Randomized Routing for Expressive
    Linear-Time Attention, 2026.)
    """
    shuffled: Pairs = Permuted(width, length, seed)
    plain: Pairs = Window(width) if causal else Neighborhood(width)
    return Mix(
        (
            Pairwise(pairs=Causal() & shuffled if causal else shuffled, output=(OutGate(),)),
            Pairwise(pairs=plain, output=(OutGate(rest=True),)),
        ),
        shares=(1.0, 1.0),
    )
