"""Any pairwise mechanism, 128 query rows at a time against all keys that they may read, recomputed in backward.

The body is the mechanism's own parts; no length x length buffer is ever held.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import cover
from saccade.parts.pair import Context, Program

SLAB = 128
NUMBERS = 1 << 25


def slab_rows(m: Pairwise, r: Request) -> int:
    """Rows of a slab: 128 (512 on a GPU), or fewer where the score holds temporaries for every pair."""
    s = r.shape
    each = s.batch * s.heads * max(1, s.keys) * m.score.temporaries(s.head_dim)
    rows = SLAB if r.device == "cpu" else 4 * SLAB
    return rows if each == 0 else max(1, min(rows, NUMBERS // each))


@functools.lru_cache(maxsize=512)
def slab_area(m: Pairwise, rows: int, keys: int, size: int) -> tuple[int, int, int]:
    """Pairs computed, the largest slab, and the number of slabs, of one head."""
    offset, slabs = keys - rows, []
    for r0 in range(0, rows, size):
        r1 = min(rows, r0 + size)
        spans = cover(m.pairs, r0 + offset, r1 + offset, keys)
        spans = [(spans[0][0], spans[-1][1])] if spans and m.sweeps else spans
        slabs.append((r1 - r0) * sum(hi - lo for lo, hi in spans))
    return sum(slabs), max(slabs, default=0), len(slabs)


def _logit_flops(m: Pairwise, r: Request, area: int, keys: int, size: int) -> int:
    """Matrix FLOPs of all logits of one head; a convolution reads a tile that its halo enlarges."""
    pair, taps = m.score.pair_flops(r.shape.head_dim), sum(p.pair_flops() for p in m.logits)
    above, left, right = m.halo
    if above == left == right == 0:
        return area * (pair + taps)
    around = spanned = 0
    for r0 in range(0, r.shape.length, size):
        r1, offset = min(r.shape.length, r0 + size), keys - r.shape.length
        found = cover(m.pairs, r0 + offset, r1 + offset, keys)
        if found:
            lo, hi = found[0][0], found[-1][1]
            spanned += (r1 - r0) * (hi - lo)
            around += (r1 - max(0, r0 - above)) * (min(keys, hi + right) - max(0, lo - left))
    return around * pair + spanned * taps


def evaluate(program: Program, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)` of some rows from whole prepared q, k and v."""
    t = program.tile(rows, program.spans(rows.start, rows.stop), q, k, v)
    w, lse = program.weights(t)
    return program.mix(w, t), lse


class Attend(torch.autograd.Function):
    """The slab loop as one differentiable step in q, k, v, the parameters and the streams."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, size: int, names: list[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        bound = rebind(program, names, tensors)
        outs, lses = [], []
        for r0 in range(0, program.rows, size):
            out, lse = evaluate(bound, slice(r0, min(program.rows, r0 + size)), bound.q, bound.k, bound.v)
            outs.append(out.to(program.context.q.dtype))
            lses.append(lse)
        ctx.program, ctx.size, ctx.names = program, size, names
        ctx.save_for_backward(*tensors)
        out = torch.cat(outs, dim=2)
        if lses[0] is None:
            return out, out.new_empty(0)
        return out, torch.cat([x for x in lses if x is not None], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[3:]) if need]
        leaves = [x.detach() for x in ctx.saved_tensors]
        sums = {
            n: torch.zeros_like(leaves[n], dtype=torch.promote_types(leaves[n].dtype, torch.float32))
            for n in wanted
        }
        for n in wanted:
            leaves[n].requires_grad_()
        bound = rebind(ctx.program, ctx.names, leaves)
        for r0 in range(0, bound.rows, ctx.size):
            rows = slice(r0, min(bound.rows, r0 + ctx.size))
            with torch.enable_grad():
                out, lse = evaluate(bound, rows, bound.q, bound.k, bound.v)
                outputs, weights = [out], [grads[0][:, :, rows].to(out.dtype)]
                if lse is not None and grads[1].numel():
                    outputs.append(lse.masked_fill(torch.isneginf(lse), 0.0))
                    weights.append(grads[1][:, :, rows].to(lse.dtype))
                kept = [(o, g) for o, g in zip(outputs, weights, strict=True) if o.requires_grad]
                if not kept:
                    continue
                found = torch.autograd.grad(
                    [o for o, _ in kept], [leaves[n] for n in wanted], [g for _, g in kept], allow_unused=True
                )
            for n, step in zip(wanted, found, strict=True):
                if step is not None:
                    sums[n] += step
        out_grads = [sums[n].to(leaves[n].dtype) if n in sums else None for n in range(len(leaves))]
        return (None, None, None, *out_grads)


def bound_inputs(program: Program) -> tuple[list[str], list[Tensor]]:
    """Everything of a program that may have a gradient, with its names."""
    named = {f"param.{n}": x for n, x in program.context.params.items()}
    named |= {f"stream.{n}": x for n, x in program.streams.items()}
    return ["q", "k", "v", *named], [program.q, program.k, program.v, *named.values()]


def rebind(program: Program, names: list[str], tensors: list[Tensor] | tuple[Tensor, ...]) -> Program:
    """The program with other tensors under those names."""
    found = dict(zip(names, tensors, strict=True))
    params = {n.removeprefix("param."): x for n, x in found.items() if n.startswith("param.")}
    streams = {n.removeprefix("stream."): x for n, x in found.items() if n.startswith("stream.")}
    return replace(
        program,
        q=found["q"],
        k=found["k"],
        v=found["v"],
        streams=streams,
        context=replace(program.context, params=params),
    )


class SlabKernel(Kernel):
    """Any pairwise mechanism, with gradients and no length x length buffer."""

    name = "slab"

    def efficiency(self, r: Request) -> float:
        return 0.35 if r.device == "cpu" else 0.08

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise):
            return [f"runs pairwise mechanisms, this one is {m.family}"]
        why = []
        if any(p.reach == "bucket" for p in m.parts()) and not r.decoding:
            why.append("attention runs inside buckets, which rows cross")
        if r.lse and not m.has_lse:
            why.append("rows have no log-denominator by which parts over split keys would merge")
        if m.heads is not None and m.heads.learned_query:
            why.append("a learned query has its own prefix scan")
        if m.tiles is not None:
            why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        keys = m.summary.rows(s.keys) if m.summary is not None else s.keys
        size = slab_rows(m, r)
        if not r.ragged:
            area, largest, count = slab_area(m, s.length, keys, size)
        else:
            area, largest, count = s.length * keys, min(size, s.length) * keys, -(-s.length // size)
        stacks = s.batch * s.heads
        after = 2 * s.value_dim + sum(p.pair_flops() for p in m.reweight)
        flops = stacks * (area * after + _logit_flops(m, r, area, keys, size))
        flops = flops * (4 if r.grad else 1) + preparation_flops(m, r)
        q, k, v, o = r.tensor_bytes()
        temporaries, steps = m.score.temporaries(s.head_dim), len(m.logits) + len(m.reweight) + len(m.value)
        held, tile = m.normalizer.held, stacks * largest * r.wide
        peak = q + max(2 * o, o + tile * max(temporaries + 1, held[0] + steps))
        if r.grad:
            peak = q + o + tile * max(3 * temporaries // 2, held[1] + steps)
            peak += 2 * q + k + v + (k + v) * r.wide // r.item + 2 * weight_bytes(m, r)
        return Cost(
            flops,
            (3 if r.grad else 1) * (q + k + v + o) + 3 * stacks * area * r.wide * (3 if r.grad else 1),
            peak,
            15 * count * (4 if r.grad else 1),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        names, tensors = bound_inputs(program)
        size = slab_rows(m, r)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            out, lse = Attend.apply(program, size, names, *tensors)
            return out, lse if lse.numel() or not out.numel() else None
        outs = [
            evaluate(program, slice(r0, min(program.rows, r0 + size)), program.q, program.k, program.v)
            for r0 in range(0, program.rows, size)
        ]
        out = torch.cat([o.to(r.dtype) for o, _ in outs], dim=2)
        return out, None if outs[0][1] is None else torch.cat([x for _, x in outs if x is not None], dim=2)
