"""Combination is the product: random sums of parts either run, and equal their definition, or are refused with a reason."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.mechanism import Named, combine, draw_named
from saccade.parts.base import PARTS, Sizes

B, H, L, D, E = 2, 4, 64, 8, 4
GRID = (8, 8)
DRAWS, BATCHES = 480, 8
SEVERAL = {
    "pairs": (1, 2, 3),
    "tokens": (0, 1, 2),
    "logits": (0, 1, 2),
    "reweight": (0, 0, 1),
    "output": (0, 0, 1, 2),
}
SINGLE = {
    "heads": 0.4,
    "score": 0.5,
    "normalizer": 0.4,
    "slots": 0.25,
    "value": 0.3,
    "summary": 0.05,
    "tiles": 0.1,
}


def drawn(rng: random.Random) -> list[str]:
    """Texts of the parts of one sum; in two of three, parts are left out one by one until it is legal."""
    by_kind: dict[str, list[str]] = {}
    for name in combine.words():
        if not PARTS[name].__module__.startswith("saccade."):  # other tests register parts of their own
            continue
        by_kind.setdefault(PARTS[name].kind, []).append(combine.example(name))
    found: list[str] = []
    for kind, counts in SEVERAL.items():
        names = by_kind.get(kind, [])
        found += rng.sample(names, min(rng.choice(counts), len(names)))
    for kind, share in SINGLE.items():
        if kind in by_kind and rng.random() < share:
            found.append(rng.choice(by_kind[kind]))
    if rng.random() < 0.15:  # the other family
        found = [
            rng.choice(
                [
                    "causal + elu1 + ratio",
                    "linear",
                    "identity",
                    "causal + identity + fixed_decay",
                    "causal + elu1 + ratio + channel_decay",
                    "causal + identity + step_decay + step_write",
                    "causal + identity + delta + gate_decay",
                ]
            )
        ]
        found += rng.sample(by_kind["tokens"] + by_kind["output"], 1)
    rng.shuffle(found)
    mend = rng.random() < 2 / 3
    while mend and len(found) > 1 and combine.refusal(*found) is not None:
        found.pop(rng.randrange(len(found)))
    return found


def inputs(m: sc.Mechanism, seed: int) -> tuple[list[Tensor], Named]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    groups = m.kv_heads(H)
    named = draw_named(m, Sizes(H, groups, D, E), B, L, generator, off=0.1, dtype=torch.float64)
    for x in (*named["params"].values(), *named["streams"].values()):
        x.requires_grad_()
    rows = 1 if m.learned_query else L
    return [normal(B, H, rows, D), normal(B, groups, L, D), normal(B, groups, L, E)], named


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.filterwarnings("ignore:.*runs by its definition")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_sums_equal_their_definition_or_are_refused(batch: int) -> None:
    outcomes: Counter[str] = Counter()
    for n in range(batch, DRAWS, BATCHES):
        texts = drawn(random.Random(n))
        text = " + ".join(texts)
        lengths = torch.tensor([L, L - 7]) if n % 3 == 0 else None
        why = ""
        try:
            m = sc.mechanism(text).on_grid(GRID)
            qkv, named = inputs(m, n)
            got = sc.attend(*qkv, m, key_lengths=lengths, **named)
        except (sc.MechanismError, sc.NotSupported) as error:
            why = str(error)
        if why:
            assert len(why) > 20, text
            outcomes["refused"] += 1
            continue
        want = sc.reference.attend(*qkv, m, key_lengths=lengths, **named)
        leaves = [*qkv, *named["params"].values(), *named["streams"].values()]
        rows = slice(0, L - 7) if lengths is not None else slice(None)
        got, want = got[:, :, rows], want[:, :, rows]
        scale = max(1.0, float(want.detach().abs().max()))
        off = float((got - want).detach().abs().max())
        assert off <= 1e-9 * scale, f"{text}: outputs differ by {off:.1e}"
        for x, a, b in zip(leaves, gradients(got, leaves), gradients(want, leaves), strict=True):
            bound = 1e-8 * max(1.0, float(b.abs().max()))
            assert bool(torch.isfinite(a).all()), (
                f"{text}: a gradient of shape {tuple(x.shape)} is not finite"
            )
            assert float((a - b).abs().max()) <= bound, (
                f"{text}: a gradient of shape {tuple(x.shape)} differs"
            )
        outcomes["ran"] += 1
    assert outcomes["ran"] >= DRAWS // BATCHES // 2, outcomes
    assert outcomes["refused"], outcomes


def test_every_part_can_be_drawn() -> None:
    drawable = SEVERAL.keys() | SINGLE.keys() | {"feature", "decay", "write", "ratio"}
    assert {PARTS[name].kind for name in combine.words()} <= drawable


def test_the_matrix_is_right_about_known_pairs() -> None:
    assert combine.together("rope", "window").legal
    assert "needs bilinear, which additive breaks" in combine.together("rope", "additive").reason
    assert "two parts of kind score" in combine.together("dot", "bilinear").reason
    assert combine.together("fixed_decay", "identity").help == "causal"
    assert not combine.together("length_project", "causal").legal


def test_the_printed_matrix_agrees_with_the_rule() -> None:
    lines = list(combine.table())
    names = combine.words()
    assert len(lines) == len(names) + 1
    width = max(map(len, names)) + 4
    for n, name in enumerate(names):
        marks = lines[n + 1][width : width + n]
        for other, mark in zip(names, marks, strict=False):
            assert (mark != ".") == combine.together(other, name).legal, (other, name)
