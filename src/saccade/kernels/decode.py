"""A few query rows against many keys: the query heads of a group become rows, keys are read once and never expanded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.cost import Cost, Request
from saccade.kernels.band import logits, tile_softmax
from saccade.kernels.base import Kernel, preparation_flops
from saccade.kernels.chunk import softmax_only
from saccade.kernels.sdpa import FEW
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import cover, whole
from saccade.parts.pair import Context, Program, take

ROWS = 16


class DecodeKernel(Kernel):
    """At most 16 query rows, any mask by position; reads only the keys that the mask can reach."""

    name = "decode"
    gradients = False

    def efficiency(self, r: Request) -> float:
        return 1.0

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if isinstance(m, Pairwise):
            if not m.static:
                why.append("pairs are chosen by content")
            why += [f"{p.name} reads pairs around a pair" for p in m.logits if p.reach == "halo"]
            why += [f"{p.name} drops pairs that the mask has" for p in m.logits if p.drops]
            if m.tiles is not None:
                why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
        if r.shape.length > ROWS:
            why.append(f"for at most {ROWS} query rows, here are {r.shape.length}")
        if r.shape.length == r.shape.keys and r.shape.length > 1:
            why.append("for queries that follow a cache")
        if r.grad:
            why.append("has no gradients")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        keys = m.summary.rows(s.keys) if m.summary is not None else s.keys
        seen = sum(hi - lo for lo, hi in cover(m.pairs, s.keys - s.length, s.keys, keys))
        area = s.batch * s.heads * s.length * seen
        q, k, v, o = r.tensor_bytes()
        share = seen / max(1, s.keys)
        joined = (
            int((k + v) * share)
            if len(cover(m.pairs, s.keys - s.length, s.keys, keys)) > 1 or r.item < 4
            else 0
        )
        return Cost(
            2 * area * (s.head_dim + s.value_dim) + preparation_flops(m, r),
            int((k + v) * share) + q + o,
            q + 2 * o + 3 * area * r.wide + joined * r.wide // r.item,
            8,
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        c, rows = program.context, program.rows
        spans = program.spans(0, rows)
        b, h, g = c.q.shape[0], c.q.shape[1], c.k.shape[1]
        if len(spans) == 1 and self._plain(m, program, *spans[0], r):
            k, v = take(program.k, spans), take(program.v, spans)
            folded = program.q.reshape(b, g, h // g * rows, -1)
            return scaled_dot_product_attention(folded, k, v, scale=1.0).reshape(b, h, rows, -1), None
        t = program.tile(slice(0, rows), spans)
        keys = t.k.shape[2]
        exist = program.exist(t)
        masked = exist is not None and not bool(exist.all())
        low = t.q.reshape(b * g, h // g * rows, -1)
        s = logits(low, t.k.reshape(b * g, keys, -1), None).view(b, h, rows, keys)
        for part in m.logits:
            s = part.tile(s, t)
        if masked and exist is not None:
            s = s.masked_fill(~exist, -torch.inf)
        if not keys:
            return t.v.new_zeros(b, h, rows, t.v.shape[-1]), s.new_full((b, h, rows), -torch.inf)
        w, lse = tile_softmax(s, masked, r.lse)
        out = torch.bmm(w.to(t.v.dtype).view(b * g, -1, keys), t.v.reshape(b * g, keys, -1))
        return out.view(b, h, rows, -1), lse

    def _plain(self, m: Pairwise, program: Program, lo: int, hi: int, r: Request) -> bool:
        """True when every row reads every key of the span and there is work for each thread of PyTorch's own kernel."""
        c = program.context
        if m.logits or r.lse or c.offset is None or c.ends is not None or c.mask is not None or hi - lo < FEW:
            return False
        stacks = program.k.shape[0] * program.k.shape[1]
        if program.q.shape[-1] != program.v.shape[-1] or (
            r.device == "cpu" and stacks < torch.get_num_threads()
        ):
            return False
        return whole(program.pairs, c.offset, c.offset + program.rows, c.start + lo, c.start + hi)
