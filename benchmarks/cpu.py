"""The CPU bars: each in one run beside what it is measured against, with pass or miss; writes benchmarks/results/cpu.json.

    python benchmarks/cpu.py [--quick] [--only WORD]

Batch 1, 8 heads, head_dim 64, float32, 8,192 tokens, medians, against scaled_dot_product_attention(is_causal=True).
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from bars import HEADS, LENGTH, Bar, Measured, beside, paired, qkv, ratio, run, samples


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What everything is measured against."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def against_full(text: str, grad: bool, count: int) -> Measured:
    """A mechanism's time over full attention's."""
    return beside(lambda q, k, v: sc.attend(q, k, v, text), full, qkv(grad=grad), count)


def window_first_call(count: int) -> Measured:
    """Seconds of the very first call in a fresh process, import apart."""
    code = (
        "import time, torch, saccade as sc; q = torch.randn(1, 8, 8192, 64); s = time.perf_counter();"
        "sc.attend(q, q, q, 'window(256)'); print(time.perf_counter() - s)"
    )
    found = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    return {"value": statistics.median(found), "samples": found}


def window_saved(count: int) -> Measured:
    """Bytes saved for backward, over those of q, k, v, out and lse."""
    inputs = qkv(grad=True)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sc.attend(*inputs, "window(256)")
    allowed = sum(x.numel() for x in (*inputs, out)) * 4 + HEADS * LENGTH * 4
    return {"value": sum(saved.values()) / allowed, "bytes": sum(saved.values())}


def linear_growth(count: int) -> Measured:
    """The exponent of time in length from 2k to 16k tokens."""
    lengths = (2048, 4096, 8192, 16384)
    times = []
    with torch.no_grad():
        for n in lengths:
            inputs = qkv(n)
            times.append(statistics.median(samples(lambda x=inputs: sc.attend(*x, "causal + linear"), count)))
    xs, ys = [math.log(n) for n in lengths], [math.log(t) for t in times]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mean_x) ** 2 for x in xs
    )
    return {"value": slope, "ms": [1e3 * t for t in times], "lengths": lengths}


def full_overhead(count: int) -> Measured:
    """Full attention through saccade over the same call of PyTorch."""
    inputs = qkv()
    with torch.no_grad():
        a, b = paired(lambda: sc.attend(*inputs, "causal"), lambda: full(*inputs), 2 * count)
    return ratio(a, b)


def planning(count: int) -> Measured:
    """Microseconds of a warm plan."""
    shape = sc.Shape(1, 8, 8192, 64)
    found = samples(lambda: [sc.plan("window(256)", shape) for _ in range(200)], 15)
    return {"value": statistics.median(found) / 200 * 1e6}


def grouped_decode(count: int) -> Measured:
    """How many times faster one token against 32,768 keys is than SDPA on expanded keys (32 heads on 4)."""
    q, k, v = qkv(32768, heads=32, kv=4, rows=1)
    wide_k, wide_v = (x.repeat_interleave(8, 1) for x in (k, v))
    with torch.no_grad():
        a, b = paired(
            lambda: scaled_dot_product_attention(q, wide_k, wide_v),
            lambda: sc.attend(q, k, v, "causal"),
            5 * count,
        )
    return ratio(a, b)


def mqa_decode(count: int) -> Measured:
    """One token at 8,192 keys with one shared key-value head, over the same with a head each (S115)."""
    q, k, v = qkv(8192, kv=1, rows=1)
    _, wide_k, wide_v = qkv(8192, rows=1)
    with torch.no_grad():
        a, b = paired(
            lambda: sc.attend(q, k, v, "causal"), lambda: sc.attend(q, wide_k, wide_v, "causal"), 30
        )
    return ratio(a, b)


def import_cost(count: int) -> Measured:
    """Milliseconds of `import saccade` after `import torch`, in fresh processes, compiled once as an installed package is."""
    cached = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    code = (
        "import time, torch; s = time.perf_counter(); import saccade; print(1e3 * (time.perf_counter() - s))"
    )
    each = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=cached
            ).stdout
        )
        for _ in range(10)
    ][1:]
    return {"value": statistics.median(each), "samples": each}


BARS: list[Bar] = [
    ("window(256) forward / full", lambda n: against_full("window(256)", False, n), "at most", 0.12),
    ("window(256) forward+backward / full", lambda n: against_full("window(256)", True, n), "at most", 0.12),
    ("window(256) first call, seconds", window_first_call, "at most", 2.0),
    ("window(256) saved / (q, k, v, out, lse)", window_saved, "at most", 1.0),
    (
        "moba(64, top=8) forward / full",
        lambda n: against_full("moba(block=64, top=8)", False, n),
        "at most",
        0.30,
    ),
    (
        "moba(64, top=8) forward+backward / full",
        lambda n: against_full("moba(block=64, top=8)", True, n),
        "at most",
        0.40,
    ),
    ("causal linear forward / full", lambda n: against_full("causal + linear", False, n), "at most", 0.10),
    ("causal linear growth exponent, 2k to 16k", linear_growth, "at most", 1.1),
    ("full through saccade / SDPA", full_overhead, "at most", 1.02),
    ("warm plan, microseconds", planning, "at most", 100.0),
    ("grouped decode, times faster than SDPA", grouped_decode, "at least", 4.0),
    ("mqa decode / multi-head decode at 8k", mqa_decode, "at most", 0.5),
    ("import beyond torch, ms", import_cost, "at most", 150.0),
]


if __name__ == "__main__":
    sys.exit(run("CPU bars", "cpu", __doc__, BARS))
