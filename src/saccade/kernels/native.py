"""Attention over tiles in the native engine: dense, causal, any mask by position, and key blocks chosen for each query."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade import native
from saccade.cost import Cost, Request
from saccade.kernels import native_choice
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.chunk import softmax_only
from saccade.kernels.native_choice import Chosen, lined
from saccade.kernels.native_table import Intervals, Table, lanes, ragged_table, table
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.native import Array, Call, Part
from saccade.parts.algebra import Pairs
from saccade.parts.logits import Slots
from saccade.parts.pair import Context, Program, without_padding
from saccade.parts.score import Dot

LARGEST = 256
BEST = -1  # the instruction set: the best of the machine
FOLDED = 32
RATE = {torch.float32: 1.0, torch.bfloat16: 1.7}


@dataclass(frozen=True)
class Work:
    """All that a pass of the engine needs to know besides its tensors."""

    scale: float
    parts: Table
    chosen: Chosen | None = None
    slots: Slots | None = None

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, terms: Tensor | None, out: Tensor, lse: Tensor | None
    ) -> Call:
        """The engine's view of a pass."""
        b, h, rows, d = q.shape
        parts = (Part * len(self.parts))(*(p.struct() for p in self.parts))
        call = Call(
            bf16=q.dtype == torch.bfloat16,
            batch=b,
            heads=h,
            kv_heads=k.shape[1],
            rows=rows,
            keys=k.shape[2],
            dim=d,
            value_dim=v.shape[-1],
            q=Array.of(q),
            k=Array.of(k),
            v=Array.of(v),
            out=Array.of(out),
            lse=None if lse is None else lse.data_ptr(),
            scale=self.scale,
            isa=BEST,
            part=ctypes.cast(parts, ctypes.POINTER(Part)),
            parts=len(parts),
        )
        if self.chosen is not None:
            blocks = self.chosen.blocks
            call.index, call.valid = blocks.index.data_ptr(), blocks.valid.data_ptr()
            call.choices, call.block, call.choice_rows = blocks.index.shape[-1], blocks.size, blocks.rows
            call.limit_lo, call.limit_hi = self.chosen.lo.data_ptr(), self.chosen.hi.data_ptr()
            call.limit_per_batch = len(self.chosen.lo) > 1
        if self.slots is not None and terms is not None:
            call.terms, call.slot = Array.of(terms), self.slots.at.data_ptr()
            call.slots, call.term_dim = self.slots.at.shape[1], self.slots.width
        return call


def forward(
    q: Tensor, k: Tensor, v: Tensor, terms: Tensor | None, work: Work, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, L, e), lse (b, h, L) float32 or None)`; the last dimension of q, k and v is contiguous."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if need_lse else None
    native.run(work.call(q, k, v, terms, out, lse), backward=False)
    return out, lse


class Attend(torch.autograd.Function):
    """The engine's two passes as one differentiable step; saves q, k, v, terms, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, terms: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, terms, work, need_lse=True)
        assert lse is not None
        ctx.save_for_backward(q, k, v, terms, out, lse)
        ctx.work = work
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, terms, out, lse = ctx.saved_tensors
        grad, grad_lse = lined(grads[0]), grads[1].contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        dterms = None if terms is None else torch.empty_like(terms)
        delta = torch.empty_like(lse)
        call = ctx.work.call(q, k, v, terms, out, lse)
        call.grad, call.dq, call.dk, call.dv = (Array.of(x) for x in (grad, dq, dk, dv))
        if dterms is not None:
            call.dterms = Array.of(dterms)
        call.delta, call.dlse = delta.data_ptr(), grad_lse.data_ptr()
        native.run(call, backward=True)
        return dq, dk, dv, dterms, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, work: Work, need_lse: bool, terms: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)`, differentiable where gradients are asked for."""
    q, k, v = lined(q), lined(k), lined(v)
    given = [x for x in (q, k, v, terms) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        out, lse = Attend.apply(q, k, v, terms, work)
        return out, lse
    return forward(q, k, v, terms, work, need_lse)


def slots_of(m: Pairwise) -> Slots | None:
    """Where the logits of a mechanism are products and what rows hold in slots of keys, those slots."""
    if len(m.logits) != 1 or not m.static:
        return None
    found = m.logits[0].slots(m.pairs)
    return found if found is not None and found.width <= LARGEST else None


def positional(m: Pairwise, r: Request) -> Table | None:
    """The table of a mask by position for a request, as it is planned."""
    s = r.shape
    return table(m.pairs, s.length, s.keys, s.keys - s.length)


class NativeKernel(Kernel):
    """Dot-product softmax in C++ on a CPU: float32 and bfloat16, any mask by position, grouped heads never expanded."""

    name = "native"

    def efficiency(self, r: Request) -> float:
        return RATE.get(r.dtype, 1.0)

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if r.device != "cpu":
            return [*why, "runs on a CPU alone"]
        if native.reason():
            why.append(f"the native engine {native.reason()}")
        if r.dtype not in RATE:
            why.append(f"for float32 and bfloat16, here is {str(r.dtype).removeprefix('torch.')}")
        if max(r.shape.head_dim, r.shape.value_dim) > LARGEST:
            why.append(f"for at most {LARGEST} numbers a head")
        if r.masked:
            why.append("a mask of single pairs is not followed into tiles")
        if not isinstance(m, Pairwise):
            return why
        if slots_of(m) is None:
            why += [f"the logits part {p.name} is not followed into tiles" for p in m.logits]
        elif r.ragged or r.decoding:
            why.append(f"the terms of {m.logits[0].name} are for whole sequences of one length")
        if m.summary is not None:
            why.append("knows no summaries")
        if m.tiles is not None:
            why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
        return why or (self._no_table(m, r) if m.static else self._no_choice(m, r))

    def _no_choice(self, m: Pairwise, r: Request) -> list[str]:
        if native_choice.form_of(m) is None:
            return [
                "pairs are not one choice of blocks, by a count or share of them, united with masks by position"
            ]
        return (
            []
            if native_choice.tables(m, r)
            else [f"the masks of {m.pairs} beside its choice are no intervals"]
        )

    def _no_table(self, m: Pairwise, r: Request) -> list[str]:
        found = positional(m, r)
        if found is None:
            return [f"pairs {m.pairs} have no short form"]
        if (r.ragged or r.decoding) and not _by_intervals(found):
            return [f"pairs {m.pairs} are tiles for whole sequences of one length"]
        if m.logits and len(found) != 1:
            return [f"the terms of {m.logits[0].name} are for one part, pairs {m.pairs} have {len(found)}"]
        return []

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        found, area, tables = self._area(m, r)
        flops = 2 * area * (s.head_dim + s.value_dim) + preparation_flops(m, r)
        q, k, v, o = r.tensor_bytes()
        prepared = 0 if isinstance(m.score, Dot) else q
        padding = k + v if r.ragged else 0
        stat = s.batch * s.heads * s.length * 4 if r.lse else 0
        slots = slots_of(m)
        held = 0 if slots is None else 4 * s.batch * s.heads * s.length * slots.width
        peak = o + prepared + padding + stat + tables + 2 * held + self._scratch(found, r)
        if not r.grad:
            return Cost(flops, q + k + v + o, peak, 4)
        flops += 2 * area * (3 * s.head_dim + 2 * s.value_dim)
        even = r.item == 4 and s.head_dim % 16 == 0 and s.value_dim % 16 == 0
        sums = 0 if even else min(torch.get_num_threads(), s.batch * s.kv_heads) * (k + v) * 4 // r.item
        peak += (
            2 * held
            + q
            + k
            + v
            + 2 * s.batch * s.heads * s.length * 4
            + sums // max(1, s.batch * s.kv_heads)
            + weight_bytes(m, r)
        )
        return Cost(flops, 3 * (q + k + v + o), peak, 8)

    def _area(self, m: Pairwise, r: Request) -> tuple[Table, int, int]:
        """The table of what position alone decides, the pairs computed a pass, and the bytes of tables and choices."""
        s = r.shape
        if m.static:
            found = positional(m, r)
            assert found is not None
            group = s.heads // s.kv_heads
            fold = group if _by_intervals(found) and len(found) == 1 and s.length <= FOLDED else 1
            area = s.batch * s.heads // fold * sum(p.area(fold) for p in found)
            return found, area, sum(p.nbytes for p in found)
        form, both = native_choice.form_of(m), native_choice.tables(m, r)
        assert form is not None
        assert both is not None
        most = s.length if r.grad else native_choice.RANGE
        routed = native_choice.lanes_expected(form[2], form[0].looks_back, s.length, s.keys, most)
        area = s.batch * s.heads * (routed * form[2].size + sum(p.area() for p in both[0]))
        return both[0], area, native_choice.state_bytes(m, r)

    def _scratch(self, found: Table, r: Request) -> int:
        s = r.shape
        tile = 4 * (lanes(s.head_dim) * 64 + 96 * 64 + 64 * lanes(s.value_dim))
        state = 4 * s.length * lanes(s.value_dim) if len(found) != 1 else 0
        return torch.get_num_threads() * (tile + state)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        parts, chosen = native_choice.bind(m, c) if not m.static else (self._table(m.pairs, c), None)
        if isinstance(m.score, Dot):
            c = without_padding(c)
            q, k, v, scale = c.q, c.k, c.v, m.score.scale or c.q.shape[-1] ** -0.5
        else:
            program = Program.bind(m, c if chosen is None else replace(c, selection=chosen.blocks))
            c, q, k, v, scale = program.context, program.q, program.k, program.v, 1.0
        slots = slots_of(m)
        terms = None if slots is None else m.logits[0].terms(q.float(), c.params, m.pairs)
        return attend(q, k, v, Work(scale, parts, chosen, slots), r.lse, terms)

    def _table(self, pairs: Pairs, c: Context) -> Table:
        rows, keys = c.q.shape[2], c.k.shape[2]
        if c.ends is None:
            assert c.offset is not None
            found = table(pairs, rows, keys, c.offset, c.start)
        else:
            found = ragged_table(pairs, c.i, keys, c.start, c.ends)
        assert found is not None
        return found


def _by_intervals(found: Table) -> bool:
    return len(found) <= 1 and all(isinstance(p, Intervals) and p.row_order is None for p in found)
