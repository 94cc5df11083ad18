"""Properties of calls that go on or are cut: decoding, saved states, merges, repetition, the text form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from saccade.errors import NotSupported
from saccade.mechanism import mechanism as parse
from saccade.parts.normalizer import merge
from saccade.parts.state import State
from saccade.plan import attend, init_state, plan
from saccade.testing.subject import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    VALUE_DIM,
    Failed,
    Skip,
    Subject,
    close,
    cut,
    shape_of,
)


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
    if s.mechanism.learned_query:
        raise Skip("one query a head: its prefix scan is this merge")
    if s.slots:
        raise Skip("its slots stand in every part, and would count in each")
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
    """The same seed gives the same bits, unless the plan says that a GPU's do not."""
    if not plan(s.mechanism, shape_of(s), device=s.device).deterministic:
        raise Skip("declared: not bit-reproducible on a GPU")
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
