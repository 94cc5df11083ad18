"""Softmax with another map from logits to weights."""

from __future__ import annotations

from saccade.mechanism import Pairwise
from saccade.parts.base import register
from saccade.parts.entmax import Entmax


def sparsemax() -> Pairwise:
    """The Euclidean projection of each row's logits to the simplex (Martins and Astudillo, From Softmax to Sparsemax, 2016)."""
    return Pairwise(normalizer=Entmax(2.0))


register("sparsemax", sparsemax)
