"""What a kernel declares, and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from saccade.cost import Cost, Request
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.base import Sizes
from saccade.parts.pair import Context
from saccade.parts.select import Select


def preparation_flops(m: Pairwise, r: Request) -> int:
    """FLOPs of the token-level work of score, summary and row terms, and of choosing pairs; with gradients, of inputs and weights too."""
    s = r.shape
    rows = s.keys if m.summary is None else m.summary.rows(s.keys)
    q, k = m.score.token_flops(s.head_dim)
    sizes = Sizes(s.heads, s.kv_heads, s.head_dim, s.value_dim)
    q += sum(p.row_flops(sizes, rows) for p in m.parts())
    flops = s.batch * (s.heads * s.length * q + s.kv_heads * rows * k)
    if m.summary is not None:
        flops += 2 * s.batch * s.kv_heads * rows * s.keys * (s.head_dim + s.value_dim)
    back = m.causal and not r.ragged
    chosen = sum(
        p.flops(s.length, s.keys, s.head_dim, back) for p in m.pairs.leaves() if isinstance(p, Select)
    )
    return flops * (3 if r.grad else 1) + s.batch * s.heads * chosen


def weight_bytes(m: Mechanism, r: Request) -> int:
    """Bytes of the mechanism's learned tensors, and so of their gradients."""
    s = r.shape
    declared = m.weights(Sizes(s.heads, s.kv_heads, s.head_dim, s.value_dim))
    return r.item * sum(math.prod(w.shape) for w in declared.values())


class Kernel(ABC):
    """One way to compute some mechanisms.

    `reasons` lists why a request cannot be run (empty: it can). `efficiency` is the share of the device's matrix rate
    that the kernel is known to reach, used only to rank candidates. `exact` is about the mechanism's own definition;
    `counted` says that PyTorch's FLOP counter, or the engine's own, sees its products as they are done.
    """

    name: ClassVar[str]
    gradients: ClassVar[bool] = True
    lse: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    counted: ClassVar[bool] = True

    def efficiency(self, r: Request) -> float:
        """Share of the device's matrix rate, for ranking."""
        return 0.5

    @abstractmethod
    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        """Why this kernel cannot run the request; empty when it can."""

    @abstractmethod
    def cost(self, m: Mechanism, r: Request) -> Cost:
        """FLOPs, bytes and peak memory of the request."""

    @abstractmethod
    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        """`(out, lse or None)`; the context has gone through the token maps."""
