"""Every n-th key: a view of keys and values with a stride, then PyTorch's attention over all of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.kernels.sdpa import SdpaKernel
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full
from saccade.parts.pair import Context
from saccade.parts.pattern import Every


class ThinKernel(Kernel):
    """Every n-th key for all queries: nothing is computed for the others."""

    name = "thin"
    counted = False
    lse = False
    deterministic = False

    def efficiency(self, r: Request) -> float:
        return SdpaKernel().efficiency(r)

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise) or not isinstance(m.pairs, Every):
            return ["pairs are not every n-th key alone"]
        why = [] if r.shape.keys > m.pairs.first else [f"there is no key {m.pairs.first}"]
        inner, asked = _inner(m, r)
        return why or SdpaKernel().reasons(inner, asked)

    def cost(self, m: Mechanism, r: Request) -> Cost:
        found = SdpaKernel().cost(*_inner(m, r))
        return replace(found, peak=found.peak + (sum(r.tensor_bytes()[1:3]) if r.grad else 0))

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        assert isinstance(m.pairs, Every)
        first, step = m.pairs.first, m.pairs.step
        ends = None if c.ends is None else ((c.ends - first + step - 1) // step).clamp_min(0)
        mask = c.mask if c.mask is None or c.mask.shape[-1] == 1 else c.mask[..., first::step].contiguous()
        thin = replace(c, k=c.k[:, :, first::step], v=c.v[:, :, first::step], ends=ends, mask=mask)
        inner, asked = _inner(m, r)
        return SdpaKernel().run(inner, thin, asked)


def _inner(m: Mechanism, r: Request) -> tuple[Pairwise, Request]:
    """The same over the keys that are left, all of them."""
    assert isinstance(m, Pairwise)
    assert isinstance(m.pairs, Every)
    keys = max(0, -(-(r.shape.keys - m.pairs.first) // m.pairs.step))
    return replace(m, pairs=Full()), replace(r, shape=replace(r.shape, keys=max(1, keys)))
