"""Mixers compute themselves; this kernel gives them a place in the plan."""

from __future__ import annotations

from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Mixer
from saccade.parts.pair import Context, without_padding


class MixerKernel(Kernel):
    """Runs a mixer's own `mix`."""

    name = "mixer"
    lse = False

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Mixer):
            return [f"runs mixers, this one is {m.family}"]
        why = []
        if r.lse:
            why.append("a mixer has no log-denominator")
        if r.masked:
            why.append("a mixer has no single pairs to mask; use key_lengths for padding")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Mixer)
        return m.cost(r)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Mixer)
        return m.mix(without_padding(c)).to(r.dtype), None
