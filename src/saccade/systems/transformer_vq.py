"""Causal softmax over keys that a codebook stands for, in linear time and with a state of constant size."""

from __future__ import annotations

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.codes import CodedDot
from saccade.parts.mask import Causal
from saccade.parts.relative import RelTable
from saccade.parts.tokens import Standardize


@system("transformer_vq", ref="S101")
def transformer_vq(codes: int = 64, block: int = 64, clip: int = 16, keep: float = 0.99) -> Pairwise:
    """Softmax over the nearest of `codes` vectors a key; positions up to `clip` back, at most a block, bend the logits.

    Old keys are counts and mean values a code. clip=0 leaves positions out; `keep` is that of the codebook's moving average. (Lingle, Transformer-VQ, 2024.)
    """
    if clip > block:
        raise MechanismError(
            f"transformer_vq: positions are told apart inside the recent block alone: clip is at most block={block}, got {clip}"
        )
    logits = (RelTable(clip),) if clip else ()
    return Pairwise(
        tokens=(Standardize(),), pairs=Causal(), score=CodedDot(codes, block, keep), logits=logits
    )
