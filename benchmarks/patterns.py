"""The bars of static patterns: time by their share of pairs; writes results/patterns.json.

    python benchmarks/patterns.py [--quick] [--only WORD]

Batch 1, 8 heads, head_dim 64, float32, 8,192 tokens, medians. A pattern's bar is its time over its share of the pairs that
scaled_dot_product_attention reads times that one's time: causal attention for patterns that look back, full for others.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from bars import HEAD_DIM, HEADS, LENGTH, Bar, Measured, beside, qkv, run
from saccade.parts.algebra import Pairs, cover, static_exist
from saccade.parts.base import Sizes

PATTERNS: tuple[tuple[str, tuple[int, ...] | None], ...] = (
    ("window(256)", None),
    ("window(1024)", None),
    ("dilated(128, step=8)", None),
    ("strided(16)", None),
    ("causal + chunk(512)", None),
    ("neighborhood(513)", None),
    ("causal + window(512) + sink(64)", None),
    ("window(256) + strided(64)", None),
    ("document((1024, 3072, 2048, 2048))", None),
    ("causal + document((1024, 3072, 2048, 2048))", None),
    ("prefix(2048)", None),
    ("powerattention", None),
    ("powerattention(local=4, sinks=1)", None),
    ("s2_attention", None),
    ("hepos(8)", None),
    ("permuted(257, length=8192)", None),
    ("causal + permuted(513, length=8192)", None),
    ("na((257,))", (8192,)),
    ("na(15)", (128, 64)),
    ("na(16, stride=16)", (128, 64)),
    ("na(15, dilation=2)", (128, 64)),
    ("na((5, 9, 9))", (8, 32, 32)),
    ("halonet(8, halo=4)", (128, 64)),
)


@functools.cache
def kept(pairs: Pairs, slab: int = 256) -> int:
    """How many pairs one head keeps."""
    total = 0
    for rows in torch.arange(LENGTH).split(slab):
        first, last = int(rows[0]), int(rows[-1]) + 1
        for lo, hi in cover(pairs, first, last, LENGTH):
            exist = static_exist(pairs, rows[:, None], torch.arange(lo, hi)[None])
            total += int(exist.expand(last - first, hi - lo).sum())
    return total


def pattern(text: str, grid: tuple[int, ...] | None, grad: bool, count: int) -> Measured:
    """A pattern's time over its share of SDPA's."""
    m = sc.mechanism(text) if grid is None else sc.mechanism(text).on_grid(grid)
    assert isinstance(m, sc.Pairwise)
    mean = sum(kept(m.pairs.at(h, HEADS)) for h in range(HEADS)) / HEADS
    share = mean / (LENGTH * (LENGTH + 1) / 2 if m.causal else LENGTH**2)
    weights = m.weights(Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM))
    mine: Callable[..., Tensor] = functools.partial(
        sc.attend, mechanism=m, params={n: w.make() for n, w in weights.items()}
    )
    full = functools.partial(scaled_dot_product_attention, is_causal=m.causal)
    found = beside(mine, full, qkv(grad=grad), count, 1 / share)
    return {**found, "share": share, "kernel": sc.plan(m, (1, HEADS, LENGTH, HEAD_DIM), grad=grad).kernel}


def bars() -> list[Bar]:
    """Each pattern forward and with gradients."""
    found: list[Bar] = []
    for text, grid in PATTERNS:
        name = text if grid is None else f"{text} on {' x '.join(map(str, grid))}"
        for grad, bar in ((False, 1.6), (True, 2.0)):
            measure = functools.partial(pattern, text, grid, grad)
            found.append((f"{name}, {'training' if grad else 'forward'} / share", measure, "at most", bar))
    return found


if __name__ == "__main__":
    sys.exit(run("Patterns", "patterns", __doc__, bars()))
