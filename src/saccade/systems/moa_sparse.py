"""A window for each head that grows with the length, and long tables of such windows kept by their digest."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Mechanism, Pairwise, system
from saccade.parts.algebra import Mask, Pairs, Span, clip
from saccade.parts.base import arg
from saccade.parts.mask import Causal, Sink

LONG = 8
Table = tuple[tuple[int, ...], tuple[float, ...]]
TABLES: dict[str, Table] = {}


@dataclass(frozen=True)
class Elastic(Mask):
    """The alpha + beta n latest keys of the n that a query has before it, itself included; at least itself."""

    alpha: int = arg(64, at_least=0)
    beta: float = arg(0.0, at_least=0.0)

    name = "elastic"
    looks_back = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta > 1:
            raise MechanismError(f"elastic: beta must be at most 1, a share of the length, got {self.beta:g}")

    @property
    def horizon(self) -> int | None:
        return max(1, self.alpha) if self.beta == 0 else None

    def span(self, n: int) -> int:
        """How many keys a query reads that has n before it, itself included."""
        return max(1, min(n, self.alpha + math.floor(self.beta * n)))

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        n = i + 1
        span = (self.alpha + torch.floor(self.beta * n.double()).long()).clamp_min(1)
        return (j <= i) & (j > i - span)

    def spans(self, i0: int, i1: int, keys: int) -> list[Span]:
        return clip(i0 + 1 - self.span(i0 + 1), i1, keys)


@dataclass(frozen=True)
class HeadSpans(Mask):
    """Head h reads the alpha[h] + beta[h] n latest keys of the n before it, itself included.

    A table of more than eight heads prints as its digest, a word that this process knows; `to_json` and `from_json` carry
    the table to another. (Fu et al., MoA: Mixture of Sparse Attention, 2024.)
    """

    alpha: tuple[int, ...] | str = arg(at_least=0)
    beta: tuple[float, ...] | None = arg(None, at_least=0)

    name = "head_spans"
    looks_back = True
    by_head = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha not in TABLES:
                raise MechanismError(
                    f"head_spans: no table is known by the digest {self.alpha}; read it with moa_sparse.from_json(...)"
                )
            alpha, beta = TABLES[self.alpha]
            object.__setattr__(self, "alpha", alpha)
            object.__setattr__(self, "beta", beta)
        super().__post_init__()
        betas = self.beta or (0.0,) * len(self.alpha)
        object.__setattr__(self, "beta", tuple(map(float, betas)))
        if len(self.alpha) != len(betas):
            raise MechanismError(f"head_spans: {len(self.alpha)} heads have an alpha and {len(betas)} a beta")
        for head in range(len(self.alpha)):
            self.at(head, len(self.alpha))

    def at(self, head: int, heads: int) -> Pairs:
        assert isinstance(self.alpha, tuple)
        assert self.beta is not None
        if heads != len(self.alpha):
            raise MechanismError(f"head_spans: its table has {len(self.alpha)} heads, the call {heads}")
        return Elastic(self.alpha[head], self.beta[head])

    def __str__(self) -> str:
        assert isinstance(self.alpha, tuple)
        return f"head_spans({digest(self)})" if len(self.alpha) > LONG else super().__str__()


def digest(spans: HeadSpans) -> str:
    """A word for the table of a mask; the text form finds the table by it as long as this process lives."""
    assert isinstance(spans.alpha, tuple)
    assert spans.beta is not None
    word = "t" + hashlib.sha256(repr((spans.alpha, spans.beta)).encode()).hexdigest()[:12]
    TABLES[word] = (spans.alpha, spans.beta)
    return word


def to_json(mechanism: Mechanism) -> str:
    """The table of the one `head_spans` of a mechanism, whole."""
    found = [p for p in mechanism.parts() if isinstance(p, HeadSpans)]
    if len(found) != 1:
        raise MechanismError(f"{mechanism} has {len(found)} head_spans; a table belongs to one")
    return json.dumps({"digest": digest(found[0]), "alpha": found[0].alpha, "beta": found[0].beta})


def from_json(text: str) -> HeadSpans:
    """The mask whose table a JSON text holds; its digest is known from here on."""
    held = json.loads(text)
    spans = HeadSpans(tuple(held["alpha"]), tuple(held["beta"]))
    if digest(spans) != held["digest"]:
        raise MechanismError(f"the table does not belong to the digest {held['digest']}: it was changed")
    return spans


@system("moa_sparse", ref="S261")
def moa_sparse(
    alpha: tuple[int, ...] | str = (64,), beta: tuple[float, ...] | None = None, sinks: int = 4
) -> Pairwise:
    """Each head reads the first `sinks` keys and its own window, alpha + beta n of the n keys so far.

    `alpha` is one number a head, or the digest of a table. `moa_search` finds a table for a trained model. (Fu et al., MoA:
    Mixture of Sparse Attention for Automatic Large Language Model Compression, 2024.)
    """
    if not isinstance(sinks, int) or sinks < 0:
        raise MechanismError(f"moa_sparse: sinks must be a whole number of at least 0, got {sinks}")
    spans: Pairs = HeadSpans(alpha, beta)
    return Pairwise(pairs=Causal() & (spans | Sink(sinks) if sinks else spans))
