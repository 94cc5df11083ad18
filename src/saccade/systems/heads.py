"""Query heads that share keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.heads import GroupedQuery


@system("gqa", ref="S193")
def gqa(kv: int = 2) -> Pairwise:
    """Query head h of H reads key-value head floor(h kv / H) (Ainslie et al., GQA, 2023)."""
    return Pairwise(heads=GroupedQuery(kv))


@system("mqa", ref="S115")
def mqa() -> Pairwise:
    """All query heads read one key-value head (Shazeer, Fast Transformer Decoding, 2019)."""
    return Pairwise(heads=GroupedQuery(1))


def pool_heads(weight: Tensor, heads: int, kv: int) -> Tensor:
    """The key or value projection (heads x d, dim) of a multi-head checkpoint as one of `kv` heads: means of groups.

    (Ainslie et al., GQA, 2023: conversion before uptraining.) Raises ValueError where the head counts do not divide.
    """
    if heads % kv or weight.shape[0] % heads:
        raise ValueError(
            f"{weight.shape[0]} rows of {heads} heads cannot be pooled to {kv} heads; the counts must divide"
        )
    return weight.view(kv, heads // kv, weight.shape[0] // heads, *weight.shape[1:]).mean(1).flatten(0, 1)


def convert(state: dict[str, Tensor], heads: int, kv: int) -> dict[str, Tensor]:
    """A state dict with every layer's key and value projections pooled to `kv` heads; the rest is kept.

    Keys are recognised by the names that `saccade.nn.Attention` gives them.
    """
    pooled = ("key_proj.weight", "value_proj.weight", "key_proj.bias", "value_proj.bias")
    return {n: pool_heads(x, heads, kv) if n.endswith(pooled) else torch.clone(x) for n, x in state.items()}
