"""Softmax attention inside buckets of tokens that were chosen by content."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.kernels.chunk import softmax_only
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import split, static_exist
from saccade.parts.bucket import CentroidBuckets
from saccade.parts.pair import Context, Program
from saccade.parts.selection import Buckets


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (b, h, n, d) at index (b, h, C, w): (b, h, C, w, d)."""
    b, h, c, w = index.shape
    flat = index.view(b, h, c * w, 1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(b, h, c, w, -1)


class BucketKernel(Kernel):
    """Gathers each bucket's tokens, attends inside, and averages the outputs of a token that several buckets took."""

    name = "bucket"
    lse = False
    deterministic = False

    def efficiency(self, r: Request) -> float:
        return 0.3 if r.device == "cpu" else 0.05

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if not isinstance(m, Pairwise):
            return why
        form = split(m.pairs)
        if (
            form is None
            or form[1] is not None
            or len(form[2]) != 1
            or not isinstance(form[2][0], CentroidBuckets)
        ):
            why.append("pairs are not buckets alone")
        if r.decoding:
            why.append("in decoding a token belongs to its nearest centroid instead")
        if r.masked:
            why.append("a mask of single pairs is not followed into buckets")
        if r.lse:
            why.append("a token may sit in several buckets, so there is no single lse")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        select = next(p for p in m.pairs.leaves() if isinstance(p, CentroidBuckets))
        s = r.shape
        wq, wk = select.bucket_width(s.length), select.bucket_width(s.keys)
        stacks = s.batch * s.heads
        pairs = stacks * select.clusters * wq * wk
        choose = 2 * stacks * (s.length + s.keys) * select.clusters * s.head_dim
        flops = choose + 2 * pairs * (s.head_dim + s.value_dim) * (3 if r.grad else 1)
        q, k, v, o = r.tensor_bytes()
        held = (
            stacks
            * select.clusters
            * (wq * (s.head_dim + s.value_dim) + wk * (s.head_dim + s.value_dim))
            * r.wide
        )
        peak = 2 * o + held + 3 * pairs * r.wide * (2 if r.grad else 1)
        return Cost(flops, q + k + v + o + 2 * held + 3 * pairs * r.wide, peak, 40)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        form = split(m.pairs)
        assert form is not None
        program = Program.bind(m, c)
        c = program.context
        chosen = program.selections[form[2][0]]  # type: ignore[index]
        assert isinstance(chosen, Buckets)
        wide = torch.promote_types(r.dtype, torch.float32)
        h, g = program.q.shape[1], program.k.shape[1]
        k, v = (x.repeat_interleave(h // g, dim=1) if g != h else x for x in (program.k, program.v))
        q_b, k_b, v_b = (
            _gather(x.to(wide), at) for x, at in ((program.q, chosen.q), (k, chosen.k), (v, chosen.k))
        )
        i = (
            c.i.view(c.i.shape[0], 1, -1)
            .expand(chosen.q.shape[0], h, -1)
            .gather(2, chosen.q.flatten(2))
            .view(chosen.q.shape)
        )
        exist = static_exist(
            form[0], i.unsqueeze(-1), (chosen.k + c.start).unsqueeze(-2)
        ) & chosen.k_valid.unsqueeze(-2)
        w, _ = m.normalizer.normalize((q_b @ k_b.transpose(-1, -2)).masked_fill(~exist, -torch.inf))
        inside = (w @ v_b) * chosen.q_valid.unsqueeze(-1)
        b, length, e = q_b.shape[0], program.q.shape[2], v_b.shape[-1]
        at = chosen.q.flatten(2)
        out = torch.zeros(b, h, length, e, dtype=wide, device=inside.device)
        out = out.scatter_add(2, at.unsqueeze(-1).expand(-1, -1, -1, e), inside.flatten(2, 3))
        taken = torch.zeros(b, h, length, dtype=wide, device=inside.device).scatter_add(
            2, at, chosen.q_valid.flatten(2).to(wide)
        )
        return (out / taken.clamp_min(1).unsqueeze(-1)).to(r.dtype), None
