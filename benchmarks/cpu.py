"""The CPU bars: each in one run beside what it is measured against, with pass or miss; writes benchmarks/results/cpu.json.

    python benchmarks/cpu.py [--quick] [--only WORD]

Batch 1, 8 heads, head_dim 64, float32, 8,192 tokens, medians, against scaled_dot_product_attention(is_causal=True).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from saccade.bench.machine import describe

RESULTS = Path(__file__).parent / "results" / "cpu.json"
HEADS, HEAD_DIM, LENGTH = 8, 64, 8192


def samples(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls after two that warm up."""
    call(), call()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def paired(a: Callable[[], object], b: Callable[[], object], count: int) -> tuple[list[float], list[float]]:
    """Seconds of two calls in turn, so that a slow spell of the machine hits both."""
    a(), b()
    left, right = [], []
    for _ in range(count):
        for call, found in ((a, left), (b, right)):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return left, right


def qkv(
    length: int = LENGTH,
    heads: int = HEADS,
    kv: int | None = None,
    rows: int | None = None,
    grad: bool = False,
) -> list[Tensor]:
    """Random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, rows or length), (kv or heads, length), (kv or heads, length))
    return [torch.randn(1, h, n, HEAD_DIM, generator=generator).requires_grad_(grad) for h, n in shapes]


def training(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of a call."""
    weight = torch.randn(inputs[0].shape)

    def step() -> None:
        torch.autograd.grad(call(*inputs), inputs, weight)

    return step


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What everything is measured against."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def against_full(text: str, grad: bool, count: int) -> dict[str, object]:
    """A mechanism's time over full attention's."""
    inputs = qkv(grad=grad)
    mine: Callable[..., Tensor] = lambda q, k, v: sc.attend(q, k, v, text)  # noqa: E731
    if grad:
        a, b = paired(training(mine, inputs), training(full, inputs), count)
    else:
        with torch.no_grad():
            a, b = paired(lambda: mine(*inputs), lambda: full(*inputs), count)
    return ratio(a, b)


def ratio(a: list[float], b: list[float]) -> dict[str, object]:
    """Median of the pairwise ratios, with both sides' medians in ms."""
    each = [x / y for x, y in zip(a, b, strict=True)]
    return {
        "value": statistics.median(each),
        "ms": 1e3 * statistics.median(a),
        "beside_ms": 1e3 * statistics.median(b),
        "samples": each,
    }


def window_first_call(count: int) -> dict[str, object]:
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


def window_saved(count: int) -> dict[str, object]:
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


def linear_growth(count: int) -> dict[str, object]:
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


def full_overhead(count: int) -> dict[str, object]:
    """Full attention through saccade over the same call of PyTorch."""
    inputs = qkv()
    with torch.no_grad():
        a, b = paired(lambda: sc.attend(*inputs, "causal"), lambda: full(*inputs), 2 * count)
    return ratio(a, b)


def planning(count: int) -> dict[str, object]:
    """Microseconds of a warm plan."""
    shape = sc.Shape(1, 8, 8192, 64)
    found = samples(lambda: [sc.plan("window(256)", shape) for _ in range(200)], 15)
    return {"value": statistics.median(found) / 200 * 1e6}


def grouped_decode(count: int) -> dict[str, object]:
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


def mqa_decode(count: int) -> dict[str, object]:
    """One token at 8,192 keys with one shared key-value head, over the same with a head each (S115)."""
    q, k, v = qkv(8192, kv=1, rows=1)
    _, wide_k, wide_v = qkv(8192, rows=1)
    with torch.no_grad():
        a, b = paired(
            lambda: sc.attend(q, k, v, "causal"), lambda: sc.attend(q, wide_k, wide_v, "causal"), 30
        )
    return ratio(a, b)


def import_cost(count: int) -> dict[str, object]:
    """Milliseconds that `import saccade` takes beyond `import torch`."""

    def spent(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    spent("import saccade")
    each = [spent("import torch, saccade") - spent("import torch") for _ in range(9)]
    return {"value": 1e3 * statistics.median(each), "samples": [1e3 * x for x in each]}


Bar = tuple[str, Callable[[int], dict[str, object]], str, float]
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 7")
    parser.add_argument("--only", default="", help="bars whose name holds this word; results are not written")
    options = parser.parse_args()
    count = 3 if options.quick else 7
    torch.manual_seed(0)
    rows = []
    console = Console()
    for name, measure, sense, bar in BARS:
        if options.only not in name:
            continue
        with console.status(name):
            found = measure(count)
        value = float(found["value"])  # type: ignore[arg-type]
        passed = value <= bar if sense == "at most" else value >= bar
        rows.append({"name": name, "sense": sense, "bar": bar, "passed": passed, **found})
        console.print(f"{'pass' if passed else 'MISS'}  {name}: {value:.3g} ({sense} {bar:g})")
    table = Table("bar", "measured", "wanted", "", title="CPU bars")
    for row in rows:
        table.add_row(
            str(row["name"]),
            f"{row['value']:.3g}",
            f"{row['sense']} {row['bar']:g}",
            "pass" if row["passed"] else "MISS",
        )
    console.print(table)
    if not options.only:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        document = {
            "made_by": "python benchmarks/cpu.py",
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "saccade": sc.__version__,
            "machine": describe("cpu"),
            "bars": rows,
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
