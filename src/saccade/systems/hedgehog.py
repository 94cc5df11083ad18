"""Linear attention through a learned feature map, made to be distilled from softmax."""

from __future__ import annotations

from saccade.mechanism import Recurrent
from saccade.parts.base import register
from saccade.parts.learned_feature import HeadMatrix, SoftmaxPair
from saccade.parts.memory import RowRatio


def hedgehog() -> Recurrent:
    """Softmax over the channels of W x and of -W x, normalised by row; `sc.nn.linearize` teaches the W of a trained layer.

    (Zhang et al., The Hedgehog and the Porcupine: Expressive Linear Attentions with Softmax Mimicry, 2024.)
    """
    return Recurrent(tokens=(HeadMatrix(),), feature=SoftmaxPair(), ratio=RowRatio())


register(hedgehog.__name__, hedgehog)
