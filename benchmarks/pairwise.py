"""The bars of pairwise parts: images, sparse weights, rotations; writes results/pairwise.json.

    python benchmarks/pairwise.py [--quick] [--only WORD]

Batch 1, float32, medians.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from bars import HEADS, Bar, Measured, beside, qkv, run

SIDE, WINDOW = 64, 7


def sparse(text: str, count: int) -> Measured:
    """A normaliser's attention over softmax's by the same kernel, 2,048 tokens; and over SDPA."""
    inputs = qkv(2048)
    mine: Callable[..., Tensor] = functools.partial(sc.attend, mechanism=text)
    found = beside(mine, lambda q, k, v: sc.attend(q, k, v, "full", kernel="slab"), inputs, count)
    plain = beside(mine, scaled_dot_product_attention, inputs, count)
    return {**found, "over_sdpa": plain["value"]}


def rotations(count: int) -> Measured:
    """A layer's forward with rope over the same without, dim 512, 2,048 tokens."""
    x = torch.randn(1, 2048, 512)
    torch.manual_seed(0)
    turned, plain = (sc.nn.Attention(512, HEADS, m) for m in ("causal + rope", "causal"))
    return beside(turned, plain, [x], 4 * count)


def image(count: int) -> Measured:
    """Neighbourhoods of 7 x 7 on 64 x 64 cells, 4 heads of 32 channels, over compiled FlexAttention on the same mask."""
    m = sc.mechanism(f"na({WINDOW}, border=drop)")
    half = WINDOW // 2

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rows, columns = i // SIDE - j // SIDE, i % SIDE - j % SIDE
        return (rows.abs() <= half) & (columns.abs() <= half)

    cells = SIDE * SIDE
    inputs = qkv(cells, heads=4, head_dim=32)
    mask = create_block_mask(near, None, None, cells, cells, device="cpu")
    flex = torch.compile(flex_attention)
    mine = sc.attend(*inputs, m, grid=(SIDE, SIDE))
    with torch.no_grad():
        off = float((mine - flex(*inputs, block_mask=mask)).abs().max())
    assert off < 1e-4, off
    return beside(
        lambda q, k, v: sc.attend(q, k, v, m, grid=(SIDE, SIDE)),
        lambda q, k, v: flex(q, k, v, block_mask=mask),
        inputs,
        4 * count,
    )


def image_memory(count: int) -> Measured:
    """The exponent of peak memory in cells, forward and backward, from 64 x 64 to 256 x 256, a fresh process each."""
    code = (
        "import sys, torch, saccade as sc; from saccade.bench.measure import peak_bytes; n = int(sys.argv[1])\n"
        "def call(n):\n"
        "    x = [torch.randn(1, 4, n * n, 32, requires_grad=True) for _ in range(3)]\n"
        "    return lambda: torch.autograd.grad(sc.attend(*x, 'na(7)', grid=(n, n)).sum(), x)\n"
        "call(16)(); print(peak_bytes(call(n), 'cpu'))"
    )
    sides, peaks = (64, 128, 256), []
    for n in sides:
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True
        )
        peaks.append(json.loads(done.stdout))
    slope = math.log(peaks[-1] / peaks[0]) / math.log(sides[-1] ** 2 / sides[0] ** 2)
    return {"value": slope, "cells": [n * n for n in sides], "bytes": peaks}


BARS: list[Bar] = [
    ("7x7 on a 64x64 image / FlexAttention compiled", image, "at most", 1.0),
    ("7x7 image memory, exponent in cells", image_memory, "at most", 1.1),
    ("entmax(1.5) / softmax at 2,048 keys", functools.partial(sparse, "entmax(1.5)"), "at most", 4.0),
    ("sparsemax / softmax at 2,048 keys", functools.partial(sparse, "sparsemax"), "at most", 4.0),
    ("rope, layer forward over the same without", rotations, "at most", 1.05),
]


if __name__ == "__main__":
    sys.exit(run("Bars of pairwise parts", "pairwise", __doc__, BARS))
