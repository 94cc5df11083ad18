"""The contract: what every mechanism must hold, checked on any, also on one that a user wrote.

    report = saccade.testing.check("causal + window(8)")

runs every property that applies, prints a table and returns it. Randomness is seeded, costs are counted and not timed,
and error budgets come from float64 and from a naive low-precision twin: at most twice the twin's error plus one rounding.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saccade import reference
from saccade.cost import Shape
from saccade.errors import NotSupported
from saccade.mechanism import ByHead, Combine, Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes
from saccade.parts.normalizer import merge
from saccade.parts.pair import Program, map_tokens
from saccade.parts.select import Selection
from saccade.parts.state import State
from saccade.plan import Attended, attend, init_state, plan
from saccade.plan.choose import finish

BATCH, HEADS, LENGTH, HEAD_DIM, VALUE_DIM = 2, 4, 160, 16, 8


Named = dict[str, Any]


class Skip(Exception):
    """A property does not apply; the text says why."""


class Failed(AssertionError):
    """A property does not hold; the text says by how much."""


@dataclass(frozen=True)
class Outcome:
    """One property: whether it held (None: it does not apply), and the figures."""

    name: str
    held: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What held of a mechanism. Print it; `ok` is False when anything failed."""

    mechanism: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """True when every property that applies held."""
        return all(o.held is not False for o in self.outcomes)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the properties that did not hold."""
        return tuple(o.name for o in self.outcomes if o.held is False)

    def __str__(self) -> str:
        words = {True: "held", False: "FAILED", None: "-"}
        lines = [f"{self.mechanism}: {'all held' if self.ok else ', '.join(self.failed) + ' FAILED'}"]
        lines += [f"  {o.name:<24} {words[o.held]:<7} {o.detail}" for o in self.outcomes]
        return "\n".join(lines)


@dataclass
class Subject:
    """A mechanism with seeded tensors of the right kinds."""

    mechanism: Mechanism
    seed: int
    device: str
    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    groups: int = field(init=False)

    def __post_init__(self) -> None:
        self.groups = self.mechanism.kv_heads(HEADS)

    @property
    def learned_query(self) -> bool:
        m = self.mechanism
        return isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query

    @property
    def selects(self) -> bool:
        return any(getattr(p, "choose", None) is not None for p in self.mechanism.parts())

    def qkv(
        self,
        length: int = LENGTH,
        dtype: torch.dtype = torch.float64,
        groups: int | None = None,
        seed: int = 0,
    ) -> list[Tensor]:
        """q, k, v of one call."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        g = self.groups if groups is None else groups
        rows = 1 if self.learned_query else length
        shapes = ((BATCH, HEADS, rows, HEAD_DIM), (BATCH, g, length, HEAD_DIM), (BATCH, g, length, VALUE_DIM))
        return [
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(self.device) for s in shapes
        ]

    def named(
        self, length: int = LENGTH, dtype: torch.dtype = torch.float64, groups: int | None = None
    ) -> Named:
        """params, streams and buffers of one call."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        sizes = Sizes(HEADS, self.groups if groups is None else groups, HEAD_DIM, VALUE_DIM)
        m = self.mechanism
        streams = {
            n: torch.rand(s.shape(BATCH, HEADS, length), generator=generator, dtype=torch.float64)
            * (length if s.positions else 1)
            for n, s in m.streams(sizes).items()
        }
        found = {
            "params": {
                n: w.make(generator) + 0.1 * torch.randn(w.shape, generator=generator)
                for n, w in m.weights(sizes).items()
            },
            "streams": streams,
            "buffers": m.buffers(sizes, generator),
        }
        return {kind: {n: x.to(dtype).to(self.device) for n, x in d.items()} for kind, d in found.items()}

    def out(self, qkv: list[Tensor], named: Named, **options: Any) -> Tensor:
        """The output alone."""
        found = attend(qkv[0], qkv[1], qkv[2], self.mechanism, **named, **options)
        return found.out if isinstance(found, Attended) else found

    def selection(self, qkv: list[Tensor], named: Named, **options: Any) -> Selection | None:
        """What the mechanism chooses, to freeze it; None for one that chooses nothing."""
        if not self.selects:
            return None
        if isinstance(self.mechanism, Combine):
            raise Skip("a choice inside a combination cannot be frozen; check its members alone")
        return attend(
            qkv[0], qkv[1], qkv[2], self.mechanism, need=("selection",), **named, **options
        ).selection


def cut(named: Named, rows: slice) -> Named:
    """The same with streams of some rows only."""
    return named | {"streams": {n: x[:, :, rows] for n, x in named["streams"].items()}}


def close(got: Tensor, wanted: Tensor, what: str, budget: float = 1e-9) -> str:
    """Raise Failed unless the largest difference, relative to the scale of `wanted`, is within the budget."""
    if got.shape != wanted.shape:
        raise Failed(f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got - wanted).abs().max()) / scale if got.numel() else 0.0
    if not error <= budget:
        raise Failed(f"{what}: off by {error:.1e}, at most {budget:.1e}")
    return f"{error:.1e}"


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
    p = plan(s.mechanism, _shape(s), device=s.device, dtype=torch.float64)
    if p.members:
        return f"plan {close(s.out(qkv, named), truth, 'plan')}"
    found = []
    for candidate in p.candidates:
        if not candidate.reasons:
            name = candidate.kernel.name
            found.append(f"{name} {close(s.out(qkv, named, kernel=name), truth, name)}")
    return ", ".join(found)


def _shape(s: Subject, length: int = LENGTH) -> Shape:
    return Shape(BATCH, HEADS, 1 if s.learned_query else length, HEAD_DIM, s.groups, length, VALUE_DIM)


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
        if s.learned_query:
            raise NotSupported("one query a head")
        out = s.out(leaves, named, mask=mask)
    except NotSupported:
        lengths = torch.tensor([LENGTH, 0], device=s.device)
        out = s.out(leaves, named, key_lengths=lengths)
        rows, where = out[1], "a sample with no key"
    else:
        rows, where = out[:, :, 5], "a masked row"
    if not _has_slots(s.mechanism) and not bool((rows == 0).all()):
        raise Failed(f"{where} gives {float(rows.detach().abs().max()):.2g}, not zeros")
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    if any(g is not None and not bool(torch.isfinite(g).all()) for g in grads):
        raise Failed(f"{where} makes gradients that are not finite")
    return where


def _has_slots(m: Mechanism) -> bool:
    return isinstance(m, Pairwise) and m.slots is not None


def grouped_heads(s: Subject) -> str:
    """Shared key-value heads give the same as those heads repeated for every query head."""
    m = s.mechanism
    if isinstance(m, ByHead):
        raise Skip("members own their heads")
    if any(p.kind == "decay" for p in m.parts()):
        raise Skip("the decay differs a state head")
    groups = s.groups if s.groups < HEADS else 2
    if s.groups < HEADS and m.weights(Sizes(HEADS, s.groups, HEAD_DIM, VALUE_DIM)):
        raise Skip("weights differ a key-value head")
    named = s.named(groups=groups)
    qkv = s.qkv(groups=groups)
    repeat = HEADS // groups
    wide = [qkv[0], *(x.repeat_interleave(repeat, 1) for x in qkv[1:])]
    shared, own = (m.weights(Sizes(HEADS, g, HEAD_DIM, VALUE_DIM)) for g in (groups, HEADS))
    kv_side = {n for n, w in shared.items() if w.shape != own[n].shape}
    named_wide: Named = {
        "params": {
            n: x.repeat_interleave(repeat, 0) if n in kv_side else x for n, x in named["params"].items()
        },
        "streams": named["streams"],
        "buffers": {
            n: x.repeat_interleave(repeat, 0) if x.shape[0] == groups != HEADS else x
            for n, x in named["buffers"].items()
        },
    }
    bare = (
        replace(m, heads=None)
        if isinstance(m, Pairwise) and m.heads is not None and not s.learned_query
        else m
    )
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


def decoding(s: Subject) -> str:
    """Token by token equals the whole call, also after a prefill in two pieces."""
    if not s.mechanism.causal:
        raise Skip("not causal")
    qkv, named = s.qkv(), s.named()
    whole = s.out(qkv, named)
    half, two = LENGTH // 3, LENGTH // 2 + 3
    pieces = [slice(0, half), slice(half, two), *(slice(t, t + 1) for t in range(two, LENGTH))]
    state = init_state(
        s.mechanism, BATCH, s.groups, HEAD_DIM, VALUE_DIM, heads=HEADS, dtype=torch.float64, device=s.device
    )
    outs = []
    for piece in pieces:
        part = [x[:, :, piece] if x.shape[2] > 1 else x for x in qkv]
        found = attend(
            part[0], part[1], part[2], s.mechanism, state=state, need=("out", "state"), **cut(named, piece)
        )
        outs.append(found.out)
        assert found.state is not None
        state = found.state
    joined = torch.cat(outs, 2)
    if s.mechanism.causality == "leak":
        gap = float((joined - whole).abs().mean() / whole.abs().mean())
        raise Skip(f"decoding chooses otherwise than training; they differ by {gap:.0%} on random input")
    return close(joined, whole, "decoded against whole", 1e-8)


def state_saves(s: Subject) -> str:
    """A state written to a file and read back goes on to the same result."""
    if not s.mechanism.causal:
        raise Skip("not causal")
    qkv, named = s.qkv(), s.named()
    t = LENGTH - 4
    first, last = slice(0, t), slice(t, LENGTH)
    first_part, last_part = ([x[:, :, p] if x.shape[2] > 1 else x for x in qkv] for p in (first, last))
    state = attend(
        first_part[0], first_part[1], first_part[2], s.mechanism, need=("out", "state"), **cut(named, first)
    ).state
    assert state is not None
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state.safetensors")
        loaded = State.load(Path(folder) / "state.safetensors", device=s.device)
    a, b = (
        attend(
            last_part[0],
            last_part[1],
            last_part[2],
            s.mechanism,
            state=x,
            need=("out", "state"),
            **cut(named, last),
        ).out
        for x in (state, loaded)
    )
    if not torch.equal(a, b):
        raise Failed(f"the loaded state goes on differently, by {float((a - b).abs().max()):.1e}")
    return f"{state.nbytes:,} bytes after {t} tokens"


def merging(s: Subject) -> str:
    """Softmax over two halves of the keys, merged by (out, lse), equals the whole."""
    qkv, named = s.qkv(), s.named()
    if s.learned_query:
        raise Skip("one query a head: its prefix scan is this merge")
    if isinstance(s.mechanism, Pairwise) and (s.mechanism.slots is not None or s.mechanism.output):
        raise Skip("slots and output maps come after the merge")
    selection = s.selection(qkv, named)
    options: dict[str, Any] = {"selection": selection} if selection is not None else {}
    j = torch.arange(LENGTH, device=s.device)
    try:
        parts = []
        for side in (j < LENGTH // 3, j >= LENGTH // 3):
            options["mask"] = side[None, None, None]
            found = attend(qkv[0], qkv[1], qkv[2], s.mechanism, need=("out", "lse"), **named, **options)
            assert found.lse is not None
            parts.append((found.out, found.lse))
        options["mask"] = None
        whole = attend(qkv[0], qkv[1], qkv[2], s.mechanism, need=("out", "lse"), **named, **options)
    except NotSupported as error:
        raise Skip(str(error).splitlines()[0][:100]) from None
    out, lse = merge(parts)
    assert whole.lse is not None
    finite = ~torch.isneginf(whole.lse)
    detail = close(out, whole.out, "merged against whole")
    close(lse[finite], whole.lse[finite], "merged lse against whole")
    return detail


def same_result(s: Subject) -> str:
    """The same seed gives the same bits."""
    a = s.out(s.qkv(dtype=torch.float32), s.named(dtype=torch.float32))
    b = s.out(s.qkv(dtype=torch.float32), s.named(dtype=torch.float32))
    if not torch.equal(a, b):
        raise Failed(f"two equal calls differ by {float((a - b).abs().max()):.1e}")
    return "bit for bit"


def text_form(s: Subject) -> str:
    """The printed text parses back to the same value, and equal values hash alike."""
    m = s.mechanism
    for text in (str(m), m.canonical()):
        again = parse(text)
        if again != m or hash(again) != hash(m):
            raise Failed(f"{text!r} parses to {again.canonical()!r}, not to {m.canonical()!r}")
    return str(m)


def cost_growth(s: Subject) -> str:
    """Counted FLOPs at two lengths are what the plan says, and grow with its exponent."""
    lengths, counted, claimed = (512, 1024), [], []
    for n in lengths:
        try:
            p = plan(s.mechanism, _shape(s, n), device=s.device)
        except NotSupported as error:
            raise Skip(str(error).splitlines()[0][:100]) from None
        kernel = None
        if not p.members and p.chosen.kernel.name == "sdpa":
            kernel = "chunk"
            p = plan(s.mechanism, _shape(s, n), device=s.device, kernel=kernel)
        try:
            with FlopCounterMode(display=False) as counter:
                s.out(s.qkv(n, torch.float32), s.named(n, torch.float32), kernel=kernel)
        except NotSupported as error:
            raise Skip(str(error).splitlines()[0][:100]) from None
        counted.append(counter.get_total_flops())
        claimed.append(p.cost.flops)
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
    if isinstance(m, Pairwise) and not s.learned_query and not bucketed:
        program = Program.bind(m, map_tokens(m.tokens, c, c.k.shape[2]))
        t = program.tile(slice(0, program.rows), [(0, program.keys)])
        rough = program.logits(t).to(dtype).float() if m.halo != (0, 0, 0) else m.score.tile(t).float()
        for part in m.logits if m.halo == (0, 0, 0) else ():
            rough = part.tile(rough, t).to(dtype).float()
        exist = program.exist(t)
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


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "shapes and dtypes": shapes_and_dtypes,
    "kernels = definition": matches_definition,
    "no future": no_future,
    "padding": padding,
    "batch": batch,
    "empty rows": empty_rows,
    "grouped heads": grouped_heads,
    "gradients": gradients,
    "decoding = whole": decoding,
    "state saves": state_saves,
    "merge of splits": merging,
    "same result": same_result,
    "text form": text_form,
    "cost growth": cost_growth,
    "float32 error": functools.partial(precision, dtype=torch.float32),
    "bfloat16 error": functools.partial(precision, dtype=torch.bfloat16),
}


def check(
    mechanism: str | Mechanism,
    *,
    seed: int = 0,
    device: str = "cpu",
    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    show: bool = True,
) -> Report:
    """Run every property of the contract on a mechanism, print a table of what held and return it.

    `oracle(q, k, v)` is an independent formula for the output, float64 (2, 4, 160, 16), (2, G, 160, 16), (2, G, 160, 8)
    to (2, 4, 160, 8): without one, the reference is the meaning. A property that raises anything counts as failed.

    >>> check("causal", show=False).ok
    True
    """
    s = Subject(parse(mechanism), seed, device, oracle)
    outcomes = []
    for name, prop in PROPERTIES.items():
        try:
            outcomes.append(Outcome(name, True, prop(s)))
        except Skip as why:
            outcomes.append(Outcome(name, None, str(why)))
        except Failed as why:
            outcomes.append(Outcome(name, False, str(why)))
        except Exception as error:  # whatever a user's part raises is a failure of the property
            outcomes.append(
                Outcome(
                    name,
                    False,
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
                )
            )
    report = Report(str(s.mechanism), tuple(outcomes))
    if show:
        print(report)
    return report
