"""Properties of one whole call: what it computes, what it must not see, and its gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from saccade import reference
from saccade.errors import NotSupported
from saccade.mechanism import ByHead, Combine, Pairwise, Recurrent
from saccade.parts.base import Sizes
from saccade.plan import attend, plan
from saccade.testing.subject import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    VALUE_DIM,
    Failed,
    Named,
    Skip,
    Subject,
    close,
    shape_of,
)


def shapes_and_dtypes(s: Subject) -> str:
    """Every float dtype comes back in its own dtype and the right shape."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out = s.out(s.qkv(dtype=dtype), s.named(dtype=dtype))
        if out.dtype != dtype or out.shape != (BATCH, HEADS, LENGTH, VALUE_DIM):
            raise Failed(f"{dtype}: got {out.dtype} {tuple(out.shape)}")
        if not bool(torch.isfinite(out).all()):
            raise Failed(f"{dtype}: not finite")
    return "float64, float32, bfloat16, float16"


def matches_definition(s: Subject) -> str:
    """Every kernel that the plan can run agrees with the reference in float64."""
    qkv, named = s.qkv(), s.named()
    truth = reference.attend(qkv[0], qkv[1], qkv[2], s.mechanism, **named)
    if s.oracle is not None:
        close(truth, s.oracle(*qkv), "the reference against the given formula")
    p = plan(s.mechanism, shape_of(s), device=s.device, dtype=torch.float64)
    if p.members:
        return f"plan {close(s.out(qkv, named), truth, 'plan')}"
    found = []
    for candidate in p.candidates:
        if not candidate.reasons:
            name = candidate.kernel.name
            found.append(f"{name} {close(s.out(qkv, named, kernel=name), truth, name)}")
    return ", ".join(found)


def no_future(s: Subject) -> str:
    """When causal, changing later tokens does not move earlier outputs."""
    if not s.mechanism.causal:
        raise Skip("not causal")
    if s.mechanism.causality == "leak":
        raise Skip("declared: its choice reads the future in training")
    qkv, named = s.qkv(), s.named()
    before = s.out(qkv, named)
    worst = 0.0
    for t in (1, LENGTH // 3, LENGTH - 1):
        other = [
            torch.cat((x[:, :, :t], y[:, :, t:]), 2) if x.shape[2] > 1 else x
            for x, y in zip(qkv, s.qkv(seed=7), strict=True)
        ]
        other[2][:, :, t:] *= 100
        moved = float((s.out(other, named) - before)[:, :, :t].abs().max())
        if moved > 1e-9:
            raise Failed(f"tokens from {t} on move earlier outputs by {moved:.1e}")
        worst = max(worst, moved)
    return f"moved by {worst:.0e}"


def padding(s: Subject) -> str:
    """A sample alone, and the same sample padded with NaN in a batch, give the same."""
    if s.mechanism.grids and not s.mechanism.causal:
        raise Skip("a padded image has another grid")
    full, short = s.qkv(), LENGTH - 57
    lengths = torch.tensor([LENGTH, short], device=s.device)
    named = s.named()
    poisoned = [x.clone() for x in full]
    for x in poisoned:
        if x.shape[2] == LENGTH:
            x[1, :, short:] = math.nan
    out = s.out(poisoned, named, key_lengths=lengths)
    alone_named = {
        k: {n: x[1:2, :, :short] for n, x in d.items()} if k == "streams" else d for k, d in named.items()
    }
    alone = s.out([x[1:2, :, :short] for x in full], alone_named)
    return close(out[1:2, :, :short], alone, "padded against alone", 1e-9)


def batch(s: Subject) -> str:
    """A sample's result does not depend on the others in its batch."""
    qkv, named = s.qkv(), s.named()
    both = s.out(qkv, named)
    one = named | {"streams": {n: x[:1] for n, x in named["streams"].items()}}
    return close(both[:1], s.out([x[:1] for x in qkv], one), "in a batch against alone")


def empty_rows(s: Subject) -> str:
    """A row that may read no key gives zeros (or its slots), and finite gradients."""
    qkv, named = s.qkv(dtype=torch.float32), s.named(dtype=torch.float32)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=s.device)
    mask[:, :, 5] = False
    leaves = [x.requires_grad_() for x in qkv]
    try:
        if s.mechanism.learned_query:
            raise NotSupported("one query a head")
        out = s.out(leaves, named, mask=mask)
    except NotSupported:
        lengths = torch.tensor([LENGTH, 0], device=s.device)
        out = s.out(leaves, named, key_lengths=lengths)
        rows, where = out[1], "a sample with no key"
    else:
        rows, where = out[:, :, 5], "a masked row"
    if not s.slots and not bool((rows == 0).all()):
        raise Failed(f"{where} gives {float(rows.detach().abs().max()):.2g}, not zeros")
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    if any(g is not None and not bool(torch.isfinite(g).all()) for g in grads):
        raise Failed(f"{where} makes gradients that are not finite")
    return where


def grouped_heads(s: Subject) -> str:
    """Shared key-value heads give the same as those heads repeated for every query head."""
    m = s.mechanism
    if isinstance(m, ByHead):
        raise Skip("members own their heads")
    if any(p.kind in ("decay", "write") for p in m.parts()):
        raise Skip("decay and writing differ a state head")
    groups = s.groups if s.groups < HEADS else 2
    if s.groups < HEADS and m.weights(Sizes(HEADS, s.groups, HEAD_DIM, VALUE_DIM)):
        raise Skip("weights differ a key-value head")
    named = s.named(groups=groups)
    qkv = s.qkv(groups=groups)
    repeat = HEADS // groups
    wide = [qkv[0], *(x.repeat_interleave(repeat, 1) for x in qkv[1:])]
    shared, own = (m.weights(Sizes(HEADS, g, HEAD_DIM, VALUE_DIM)) for g in (groups, HEADS))
    kv_side = {n for n, w in shared.items() if w.shape != own[n].shape}
    bare = (
        replace(m, heads=None)
        if isinstance(m, Pairwise | Recurrent) and m.heads is not None and not m.learned_query
        else m
    )
    kept = bare.weights(Sizes(HEADS, HEADS, HEAD_DIM, VALUE_DIM))
    named_wide: Named = {
        "params": {
            n: x.repeat_interleave(repeat, 0) if n in kv_side else x
            for n, x in named["params"].items()
            if n in kept
        },
        "streams": named["streams"],
        "buffers": {
            n: x.repeat_interleave(repeat, 0) if x.shape[0] == groups != HEADS else x
            for n, x in named["buffers"].items()
        },
    }
    wide_out = attend(wide[0], wide[1], wide[2], bare, **named_wide)
    return close(s.out(qkv, named), wide_out, "grouped against repeated")


def gradients(s: Subject) -> str:
    """Gradients agree with the reference's, and with central differences of the definition, in float64."""
    qkv, named = s.qkv(), s.named()
    frozen: dict[str, Any] = (
        {"selection": s.selection(qkv, named)} if s.selects and not isinstance(s.mechanism, Combine) else {}
    )
    leaves = [x.clone().requires_grad_() for x in qkv]
    extra: Named = {
        k: {n: x.clone().requires_grad_(k != "buffers") for n, x in d.items()} for k, d in named.items()
    }
    inputs = [*leaves, *extra["params"].values(), *extra["streams"].values()]
    generator = torch.Generator().manual_seed(s.seed + 3)
    out = s.out(leaves, extra, **frozen)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(s.device)
    got = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    truth = torch.autograd.grad(
        (reference.attend(leaves[0], leaves[1], leaves[2], s.mechanism, **extra) * weight).sum(),
        inputs,
        allow_unused=True,
    )
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        if a is not None and b is not None:
            worst = max(worst, float(close(a, b, "gradient against the reference's", 1e-8)))
    soft = [p.name for p in s.mechanism.parts() if p.straight_through]
    if soft:
        return (
            f"reference {worst:.1e}; that of {soft[0]} is of a softer formula, which differences do not see"
        )
    way = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(s.device) for x in inputs]
    along = float(sum((g * d).sum() for g, d in zip(got, way, strict=True) if g is not None))
    count = len(extra["params"])

    def value(step: float) -> float:
        moved = [(x + step * d).detach() for x, d in zip(inputs, way, strict=True)]
        there: Named = {
            "params": dict(zip(extra["params"], moved[3 : 3 + count], strict=True)),
            "streams": dict(zip(extra["streams"], moved[3 + count :], strict=True)),
            "buffers": named["buffers"],
        }
        return float((s.out(moved[:3], there, **frozen) * weight).sum())

    for step in (1e-6, 1e-8):  # the second crosses no kink of a rectified score
        slope = (value(step) - value(-step)) / (2 * step)
        if abs(slope - along) <= 1e-5 * max(1.0, abs(slope), abs(along)):
            break
    else:
        raise Failed(f"slope {along:.6g} against {slope:.6g} by central differences")
    return f"reference {worst:.1e}, differences {abs(slope - along) / max(1.0, abs(slope)):.1e}"
