"""Means of values over a prefix or over all keys, where every key weighs alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full
from saccade.parts.mask import Causal
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, without_padding
from saccade.parts.score import Uniform


class MeanKernel(Kernel):
    """Equal weights over all keys or over those up to the query: sums of values, linear in the length."""

    name = "mean"

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise):
            return [f"runs pairwise mechanisms, this one is {m.family}"]
        why = []
        if not isinstance(m.score, Uniform):
            why.append(f"the score {m.score.name} tells keys apart")
        if m.pairs not in (Full(), Causal()):
            why.append("rows read other keys than all or those up to themselves")
        if type(m.normalizer) is not Softmax or m.logits or m.reweight or m.value:
            why.append("weights are changed, so that keys may weigh otherwise")
        if m.heads is not None and m.heads.learned_query:
            why.append("a learned query has its own prefix scan")
        if m.summary is not None:
            why.append("keys are summarised first")
        if m.tiles is not None:
            why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
        if r.masked:
            why.append("a mask of single pairs leaves no common sums")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        _, _, v, o = r.tensor_bytes()
        sums = v * r.wide // r.item
        wide = o * r.wide // r.item
        passes = 3 if r.grad else 1
        peak = 2 * sums + (3 if r.grad else 2) * wide if m.causal else o + (0 if r.item >= 4 else sums)
        return Cost(0, passes * (v + o) + 2 * sums, peak, 12 * passes)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        c = without_padding(c)
        wide = torch.promote_types(c.v.dtype, torch.float32)
        last, rows = c.key_ends[:, None], c.q.shape[2]
        if m.causal:
            last = torch.minimum(c.i + 1 - c.start, last).clamp_min(0)
            before = pad(c.v.to(wide).cumsum(2), (0, 0, 1, 0))
            index = last.expand(c.v.shape[0], rows)[:, None, :, None]
            sums = before.gather(2, index.expand(-1, c.v.shape[1], -1, c.v.shape[3]))
        else:
            sums = c.v.to(wide).sum(2, keepdim=True)
        count = last[:, None, :, None]
        mean = (sums / count.clamp_min(1)).to(r.dtype)
        mean = mean.repeat_interleave(c.q.shape[1] // c.v.shape[1], 1)
        out = mean.expand(c.q.shape[0], c.q.shape[1], rows, c.v.shape[3]).contiguous()
        return out, count.squeeze(-1).to(wide).log().expand(out.shape[:3]).contiguous()
