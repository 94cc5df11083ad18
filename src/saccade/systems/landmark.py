"""Blocks with landmarks: trained whole, read a few blocks at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.landmark import GroupedSoftmax, LandmarkKey, StingyRope
from saccade.parts.mask import Causal, Chunk
from saccade.parts.select import TopBlocks
from saccade.parts.tokens import Rope


@system("landmark_attention", ref="S165")
def landmark_attention(block: int = 64, top: int | None = None, far: int | None = None) -> Pairwise:
    """Causal attention with rope to blocks of `block` tokens, the last of each a landmark, under a grouped softmax.

    That is the form to train. With `top` a query reads its own block and the `top` blocks whose landmarks it scores
    highest, none of them farther than `far` blocks as rope sees it, top + 1 unless given. (Mohtashami and Jaggi, Landmark Attention:
    Random-Access Infinite Context Length for Transformers, 2023.)
    """
    if top is None and far is not None:
        raise MechanismError(
            f"landmark_attention: far={far} is for fetched blocks; give top, or leave it out"
        )
    if top is None:
        return Pairwise(tokens=(Rope(),), pairs=Causal(), normalizer=GroupedSoftmax(block))
    reach = top + 1 if far is None else far
    fetched = TopBlocks(block, top, LandmarkKey(far=reach))
    return Pairwise(
        pairs=Causal() & (fetched | Chunk(block)),
        score=StingyRope(block, far=reach),
        normalizer=GroupedSoftmax(block),
    )


def with_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """Tokens (B, n) with `landmark` after every block - 1 of them, (B, n + n // (block - 1))."""
    if block < 2:
        raise ValueError(f"a block holds a token and its landmark, so at least 2, got {block}")
    width, count = block - 1, tokens.shape[1] // (block - 1)
    whole = tokens[:, : count * width].unflatten(1, (count, width))
    marks = torch.full_like(whole[..., :1], landmark)
    return torch.cat((torch.cat((whole, marks), -1).flatten(1), tokens[:, count * width :]), 1)
