"""Mechanisms that are wrong on purpose, one defect each: the contract must catch every one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.mechanism import Mechanism, Mixer, Pairwise, Recurrent
from saccade.parts.algebra import Mask
from saccade.parts.feature import Feature
from saccade.parts.logits import Logits
from saccade.parts.mask import Causal, Window
from saccade.parts.memory import RowRatio
from saccade.parts.normalizer import Normalizer, Softmax
from saccade.parts.score import Score, grouped_matmul
from saccade.parts.summary import Summary
from saccade.parts.tokens import TokenMap


@dataclass(frozen=True)
class PeeksAhead(Mask):
    """Claims to look back, and reads one key ahead."""

    name = "peeks_ahead"
    looks_back = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + 1


@dataclass(frozen=True)
class NarrowCover(Mask):
    """Covers fewer keys than it lets exist."""

    name = "narrow_cover"
    looks_back = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def spans(self, i0: int, i1: int, keys: int) -> list[tuple[int, int]]:
        return [(max(0, i0 - 16), min(keys, i1))]


@dataclass(frozen=True)
class PooledSummary(Summary):
    """Pools keys in fours, padding included."""

    name = "pooled_summary"

    def reduce(
        self, k: Tensor, v: Tensor, valid: Tensor | None, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return k.unflatten(2, (4, -1)).mean(2), v.unflatten(2, (4, -1)).mean(2)

    def rows(self, keys: int) -> int:
        return keys // 4


@dataclass(frozen=True)
class WrongScale(Score):
    """Claims to be a dot product of what it prepares, and halves it in its tile."""

    name = "wrong_scale"
    factored = True

    def tile(self, t: Any) -> Tensor:
        return grouped_matmul(t.q, t.k.transpose(-1, -2)) / 2


@dataclass(frozen=True)
class Interleaved(Score):
    """Query head h reads key-value head h mod G."""

    name = "interleaved"

    def tile(self, t: Any) -> Tensor:
        return t.q @ t.k.repeat(1, t.q.shape[1] // t.k.shape[1], 1, 1).transpose(-1, -2)


@dataclass(frozen=True)
class BareSoftmax(Normalizer):
    """No care for a row without keys."""

    name = "bare_softmax"

    def normalize(self, s: Tensor, t: Any = None) -> tuple[Tensor, Tensor | None]:
        return torch.softmax(s, -1), torch.logsumexp(s, -1)


@dataclass(frozen=True)
class MaxAsLse(Normalizer):
    """Answers the row maximum for the log-denominator."""

    name = "max_as_lse"
    gives = Softmax.gives

    def normalize(self, s: Tensor, t: Any = None) -> tuple[Tensor, Tensor | None]:
        return Softmax().normalize(s)[0], s.amax(-1)


@dataclass(frozen=True)
class FromZero(TokenMap):
    """Positions counted from the start of the call, not of the sequence."""

    name = "from_zero"

    def map(self, x: Tensor, positions: Tensor, on: Any, c: Any) -> Tensor:
        return x * (1 + 0.01 * (positions - positions[:, :1]))[:, None, :, None]


@dataclass(frozen=True)
class AcrossBatch(TokenMap):
    """Subtracts the mean of the batch."""

    name = "across_batch"

    def map(self, x: Tensor, positions: Tensor, on: Any, c: Any) -> Tensor:
        return x - x.mean(0, keepdim=True)


@dataclass(frozen=True)
class Dice(TokenMap):
    """Adds noise that nobody seeded."""

    name = "dice"

    def map(self, x: Tensor, positions: Tensor, on: Any, c: Any) -> Tensor:
        return x + 1e-3 * torch.randn(
            x.shape, generator=torch.Generator().manual_seed(torch.seed() % 2**31)
        ).to(x.dtype)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@dataclass(frozen=True)
class WrongGradient(Logits):
    """The identity, whose gradient is doubled."""

    name = "wrong_gradient"

    def tile(self, s: Tensor, t: Any) -> Tensor:
        return Doubled.apply(s)


@dataclass(frozen=True)
class WrongText(Logits):
    """Prints as something else."""

    name = "wrong_text"

    def tile(self, s: Tensor, t: Any) -> Tensor:
        return s

    def __str__(self) -> str:
        return "alibi"


@dataclass(frozen=True)
class CentredFeature(Feature):
    """Subtracts the mean over the tokens of the call, so chunks and steps see different features."""

    name = "centred_feature"
    gives = frozenset({"denominator"})

    def map(
        self, x: Tensor, side: str, valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.exp(x - x.mean(2, keepdim=True)), None


@dataclass(frozen=True)
class CheapClaim(Mixer):
    """Compares all pairs and claims linear cost."""

    name = "cheap_claim"
    relative = "linear"
    __hash__ = Mixer.__hash__

    def mix(self, c: Any) -> Tensor:
        s = grouped_matmul(c.q, c.k.transpose(-1, -2))
        s = s if c.valid is None else s.masked_fill(~c.valid[:, None, None], -torch.inf)
        return grouped_matmul(Softmax().normalize(s)[0], c.v)

    def define(self, c: Any) -> Tensor:
        return self.mix(c)

    def cost(self, r: Request) -> Cost:
        return Cost(2 * r.shape.heads * r.shape.length * r.shape.head_dim**2, 1, 1)


@dataclass(frozen=True)
class HalfInside(CheapClaim):
    """Softmax attention that goes through 16 bits wherever it may."""

    name = "half_inside"
    __hash__ = Mixer.__hash__

    def mix(self, c: Any) -> Tensor:
        if c.q.dtype == torch.float64:
            return super().mix(c)
        return super().mix(
            replace(c, q=c.q.bfloat16().float(), k=c.k.bfloat16().float(), v=c.v.bfloat16().float())
        )

    def define(self, c: Any) -> Tensor:
        return super().mix(c)


BROKEN: dict[str, tuple[Mechanism, str]] = {
    "future leak": (Pairwise(pairs=PeeksAhead()), "no future"),
    "cover too narrow": (Pairwise(pairs=NarrowCover()), "kernels = definition"),
    "padding leak": (Pairwise(summary=PooledSummary()), "padding"),
    "wrong scale": (Pairwise(pairs=Causal(), score=WrongScale()), "kernels = definition"),
    "wrong grouping": (Pairwise(pairs=Causal(), score=Interleaved()), "grouped heads"),
    "NaN on an empty row": (Pairwise(pairs=Causal(), normalizer=BareSoftmax()), "empty rows"),
    "wrong lse": (Pairwise(pairs=Causal(), normalizer=MaxAsLse()), "merge of splits"),
    "decode differs from prefill": (Pairwise(pairs=Causal(), tokens=(FromZero(),)), "decoding = whole"),
    "chunk differs from step": (
        Recurrent(pairs=Causal(), feature=CentredFeature(), ratio=RowRatio()),
        "decoding = whole",
    ),
    "batch leak": (Pairwise(pairs=Causal(), tokens=(AcrossBatch(),)), "batch"),
    "not reproducible": (Pairwise(pairs=Causal(), tokens=(Dice(),)), "same result"),
    "imprecise": (HalfInside(), "float32 error"),
    "wrong gradient": (Pairwise(pairs=Window(16), logits=(WrongGradient(),)), "gradients"),
    "wrong text": (Pairwise(pairs=Causal(), logits=(WrongText(),)), "text form"),
    "wrong cost claim": (CheapClaim(), "cost growth"),
}
