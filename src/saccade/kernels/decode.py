"""A few query rows against many keys: the query heads of a group become rows, keys are read once and never expanded."""

from __future__ import annotations

from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.kernels.chunk import softmax_only
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.mask import cover
from saccade.parts.pair import Context, Program

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
            2 * area * (s.head_dim + s.value_dim),
            int((k + v) * share) + q + o,
            q + 2 * o + 3 * area * r.wide + joined * r.wide // r.item,
            8,
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        tile = program.tile(slice(0, program.rows), program.spans(0, program.rows))
        w, lse = program.weights(tile)
        b, h, rows, keys = w.shape
        g = tile.k.shape[1]
        low = w.to(tile.v.dtype).view(b, g, -1, keys)
        out = (low @ tile.v).view(b, h, rows, -1)
        return out.to(r.dtype), lse
