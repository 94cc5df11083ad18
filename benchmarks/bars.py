"""What the bars share: timing in pairs, the table of pass and miss, and the JSON that is committed."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import saccade as sc
from saccade.bench.machine import describe

HEADS, HEAD_DIM, LENGTH = 8, 64, 8192
FOLDER = Path(__file__).parent / "results"

Measured = dict[str, object]
Bar = tuple[str, Callable[[int], Measured], str, float]


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


def ratio(a: list[float], b: list[float], scale: float = 1.0) -> Measured:
    """Median of the pairwise ratios times `scale`, with both sides' medians in ms."""
    each = [scale * x / y for x, y in zip(a, b, strict=True)]
    return {
        "value": statistics.median(each),
        "ms": 1e3 * statistics.median(a),
        "beside_ms": 1e3 * statistics.median(b),
        "samples": each,
    }


def qkv(
    length: int = LENGTH,
    heads: int = HEADS,
    kv: int | None = None,
    rows: int | None = None,
    grad: bool = False,
    head_dim: int = HEAD_DIM,
) -> list[Tensor]:
    """Random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, rows or length), (kv or heads, length), (kv or heads, length))
    return [torch.randn(1, h, n, head_dim, generator=generator).requires_grad_(grad) for h, n in shapes]


def training(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of a call."""
    weight = torch.randn(inputs[0].shape)

    def step() -> None:
        torch.autograd.grad(call(*inputs), inputs, weight)

    return step


def beside(
    mine: Callable[..., Tensor],
    other: Callable[..., Tensor],
    inputs: list[Tensor],
    count: int,
    scale: float = 1.0,
) -> Measured:
    """The time of one call over that of another, with gradients where the inputs ask for them."""
    if inputs[0].requires_grad:
        return ratio(*paired(training(mine, inputs), training(other, inputs), count), scale)
    with torch.no_grad():
        return ratio(*paired(lambda: mine(*inputs), lambda: other(*inputs), count), scale)


def run(
    title: str,
    script: str,
    description: str | None,
    bars: Sequence[Bar],
    device: str = "cpu",
    given: Sequence[str] | None = None,
) -> int:
    """Measure every bar, print pass or miss, and write results/SCRIPT.json unless only some were asked for.

    On another device than a CPU the file is SCRIPT_DEVICE.json; `given` are arguments instead of the command line's.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 7")
    parser.add_argument("--only", default="", help="bars whose name holds this word; results are not written")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    rows, console = [], Console()
    for name, measure, sense, bar in bars:
        if options.only not in name:
            continue
        with console.status(name):
            found = measure(3 if options.quick else 7)
        value = float(found["value"])  # type: ignore[arg-type]
        passed = value <= bar if sense == "at most" else value >= bar
        rows.append({"name": name, "sense": sense, "bar": bar, "passed": passed, **found})
        console.print(f"{'pass' if passed else 'MISS'}  {name}: {value:.3g} ({sense} {bar:g})")
    table = Table("bar", "measured", "wanted", "", title=title)
    for row in rows:
        wanted = f"{row['sense']} {row['bar']:g}"
        table.add_row(str(row["name"]), f"{row['value']:.3g}", wanted, "pass" if row["passed"] else "MISS")
    console.print(table)
    if not options.only:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        document = {
            "made_by": f"python benchmarks/{script}.py",
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip(),
            "saccade": sc.__version__,
            "machine": describe(device),
            "bars": rows,
        }
        path = FOLDER / f"{script if device == 'cpu' else f'{script}_{device}'}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {path}")
    return 0
