"""Properties that are counted or bounded: the growth of cost, and the error in low precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saccade import native, reference
from saccade.errors import NotSupported
from saccade.mechanism import Pairwise
from saccade.parts.pair import Program, map_tokens
from saccade.parts.selection import Selection
from saccade.plan import Plan, plan
from saccade.plan.choose import finish
from saccade.testing.subject import Failed, Named, Skip, Subject, shape_of


def cost_growth(s: Subject) -> str:
    """Counted FLOPs at two lengths are what the plan says, and grow with its exponent."""
    if s.given.grids and None not in s.given.grids:
        raise Skip("made for one grid, so for one length")
    counted: list[int] = []
    claimed: list[int] = []
    kernel: str | None = None
    for n in (1024, 512):
        at = replace(s, length=n)
        try:
            p = plan(at.mechanism, shape_of(s, n), device=s.device, kernel=kernel)
        except NotSupported as error:
            raise Skip(str(error).splitlines()[0][:100]) from None
        if not p.members and not p.chosen.kernel.counted:
            seen = [c.kernel.name for c in p.candidates if not c.reasons and c.kernel.counted]
            if not seen:
                raise Skip(f"nothing counts what {p.chosen.kernel.name} does")
            p = plan(at.mechanism, shape_of(s, n), device=s.device, kernel=seen[0])
        if s.device != "cpu" and not all(x.chosen.kernel.counted for x in _leaves(p)):
            raise Skip("nothing counts what the kernels of its members do")
        kernel = None if p.members else p.chosen.kernel.name
        try:
            with FlopCounterMode(display=False) as counter, native.counting() as engine:
                at.out(s.qkv(n, torch.float32), s.named(n, torch.float32), kernel=kernel)
        except NotSupported as error:
            raise Skip(str(error).splitlines()[0][:100]) from None
        counted.insert(0, counter.get_total_flops() + engine.flops)
        claimed.insert(0, p.cost.flops)
    if not counted[1] and not claimed[1]:
        raise Skip("no matrix products, counted or claimed")
    grown, said = (math.log2(x[1] / max(1, x[0])) for x in (counted, claimed))
    ratio = claimed[1] / max(1, counted[1])
    limit = 0.25 if s.selects else 0.03
    if abs(grown - said) > 0.15 or abs(ratio - 1) > limit:
        raise Failed(
            f"counted {counted[1]:,} with exponent {grown:.2f}; claimed {claimed[1]:,} with exponent {said:.2f}"
        )
    return f"exponent {grown:.2f}, claimed {said:.2f}; FLOPs {ratio:.3f} of counted"


def _leaves(p: Plan) -> list[Plan]:
    """The plans that run kernels."""
    return [leaf for member in p.members for leaf in _leaves(member)] if p.members else [p]


def precision(s: Subject, dtype: torch.dtype) -> str:
    """The error in low precision is at most twice that of a naive computation in it, plus one rounding."""
    qkv, named = s.qkv(dtype=dtype), s.named(dtype=dtype)
    selection = s.selection(qkv, named)
    options: dict[str, Any] = {"selection": selection} if selection is not None else {}
    wide, wide_named = (
        [x.double() for x in qkv],
        {k: {n: x.double() for n, x in d.items()} for k, d in named.items()},
    )
    truth = s.out(wide, wide_named, kernel=None, **options)
    got, twin = s.out(qkv, named, **options), _twin(s, qkv, named, dtype, selection)
    unit = torch.finfo(dtype).eps
    budget = 2 * float((twin.double() - truth).abs().max()) + unit * float(truth.abs().max())
    error = float((got.double() - truth).abs().max())
    if not error <= budget:
        raise Failed(f"{dtype}: error {error:.1e}, budget {budget:.1e}")
    return f"error {error:.1e} of {budget:.1e}"


def _twin(
    s: Subject, qkv: list[Tensor], named: Named, dtype: torch.dtype, selection: Selection | None
) -> Tensor:
    """A naive computation in `dtype`.

    Pairwise: logits and weights rounded to it. Others: the definition itself in float32, and in 16 bits the definition on
    inputs that are rounded once more.
    """
    m = s.mechanism
    c = reference.context(qkv[0], qkv[1], qkv[2], **named)
    c = replace(c, q=qkv[0], k=qkv[1], v=qkv[2], selection=selection)
    bucketed = any(p.reach == "bucket" for p in m.parts())
    if isinstance(m, Pairwise) and not s.mechanism.learned_query and not bucketed:
        program = Program.bind(m, map_tokens(m.tokens, c, c.k.shape[2]))
        t = program.tile(slice(0, program.rows), [(0, program.keys)])
        rough = program.logits(t).to(dtype).float() if m.halo != (0, 0, 0) else m.score.tile(t).float()
        for part in m.logits if m.halo == (0, 0, 0) else ():
            rough = part.tile(rough, t).to(dtype).float()
        rough, exist = program.weighed(rough, t), program.exist(t)
        w, lse = m.normalizer.normalize(rough if exist is None else rough.masked_fill(~exist, -torch.inf), t)
        for reweight in m.reweight:
            w = reweight.tile(w, t)
        return finish(m, program.context, program.mix(w.to(dtype), t), lse)[0]
    if dtype == torch.float32:
        return reference.evaluate(m, c)[0]
    generator = torch.Generator().manual_seed(s.seed + 5)
    unit = torch.finfo(dtype).eps
    jolts = [
        1 + unit * (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(s.device)
        for x in qkv
    ]
    wide: Named = {kind: {n: x.double() for n, x in d.items()} for kind, d in named.items()}
    options: dict[str, Any] = {"selection": selection} if selection is not None else {}
    return s.out([x.double() * jolt for x, jolt in zip(qkv, jolts, strict=True)], wide, **options).to(dtype)
