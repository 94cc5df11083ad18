"""What a kernel declares, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from saccade.cost import Cost, Request
from saccade.mechanism.values import Mechanism
from saccade.parts.pair import Context


class Kernel(ABC):
    """One way to compute some mechanisms.

    `reasons` lists why a request cannot be run (empty: it can). `efficiency` is the share of the device's matrix rate
    that the kernel is known to reach, used only to rank candidates. `exact` is about the mechanism's own definition.
    """

    name: ClassVar[str]
    gradients: ClassVar[bool] = True
    lse: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    exact: ClassVar[bool] = True

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
