"""How the time of linear mechanisms grows with the length; writes results/linear.json.

    python benchmarks/linear.py [--quick] [--only WORD]

Batch 1, float32, forward, medians of pairs of calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import saccade as sc
from bars import Bar, Measured, paired, qkv, ratio, run
from saccade.mechanism import draw_named
from saccade.parts.base import Sizes


def call(text: str, length: int, heads: int, head_dim: int) -> Callable[[], object]:
    """One forward call of a mechanism with random inputs."""
    m, sizes = sc.mechanism(text), Sizes(heads, heads, head_dim, head_dim)
    named = draw_named(m, sizes, 1, length, torch.Generator().manual_seed(0))
    q, k, v = qkv(length, heads, head_dim=head_dim)

    def forward() -> None:
        with torch.no_grad():
            sc.attend(q, k, v, m, **named)

    return forward


def doubled(text: str, heads: int, head_dim: int, count: int) -> Measured:
    """Time at 8,192 tokens over time at 4,096."""
    return ratio(*paired(*(call(text, n, heads, head_dim) for n in (8192, 4096)), count))


def speed(text: str, count: int) -> Measured:
    """Tokens a second at 16,384 tokens over tokens a second at 2,048, 8 heads of 64."""
    return ratio(*paired(*(call(text, n, 8, 64) for n in (2048, 16384)), count), scale=8)


BARS: list[Bar] = [
    ("S210: tokens/s, 16k over 2k", functools.partial(speed, "lightning_attention_tnl"), "at least", 0.8),
    ("S131: 8k over 4k, order 2, d = 32", functools.partial(doubled, "fastmax", 1, 32), "at most", 2.4),
    ("S131: the same, causal", functools.partial(doubled, "causal + fastmax", 1, 32), "at most", 2.4),
    ("S176: 8k over 4k", functools.partial(doubled, "lln_attention", 8, 64), "at most", 2.3),
    ("S176: the same, causal", functools.partial(doubled, "causal + lln_attention", 8, 64), "at most", 2.3),
]

if __name__ == "__main__":
    raise SystemExit(run("Linear mechanisms and the length", "linear", __doc__, BARS))
