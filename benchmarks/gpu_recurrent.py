"""Recurrent mechanisms on one GPU beside flash-linear-attention, in one process: bfloat16, 16 heads, a state of 128 by 128.

    python benchmarks/gpu_recurrent.py [--out FOLDER] [--only WORD] [--no-peer]

Rates are bytes of q, k, v and the output over the time of a call; calls follow each other without waiting for the device, so that
the host counts only where it is the slower one. The peer is the package `fla`, on tensors in its own layout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from saccade.kernels import delta_run, gated, state_run
from saccade.kernels.state_run import Form

HEADS, DIM = 16, 128
SHAPES = ((1, 32768), (8, 4096))
FOLDER = Path(__file__).parent / "results"
NAMES = ("linear attention", "retention", "gated linear attention", "gated delta rule")


def timed(call: Callable[[], object], count: int = 15) -> float:
    """Median milliseconds of calls that are queued one after another."""
    call(), call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call by the host's clock, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def inputs(name: str, batch: int, length: int, heads: int = HEADS) -> list[Tensor]:
    """q, k, v and what the mechanism reads besides: log decays, and strengths of writing."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*last: int) -> Tensor:
        return torch.randn(batch, heads, length, *last, device="cuda", generator=g)

    q, k, v = (normal(DIM).bfloat16() for _ in range(3))
    if name == "retention":
        steps = torch.arange(heads, device="cuda", dtype=torch.float32)
        return [q, k, v, torch.log1p(-torch.exp2(-5 - steps)).view(1, -1, 1, 1)]
    if name == "gated linear attention":
        return [q, k, v, torch.nn.functional.logsigmoid(normal(DIM)) / 16]
    if name == "gated delta rule":
        k = torch.nn.functional.normalize(k.float(), dim=-1).bfloat16()
        return [q, k, v, torch.nn.functional.logsigmoid(normal(1)) / 16, normal().sigmoid()]
    return [q, k, v]


def ours(name: str) -> Callable[..., Tensor]:
    """The kernel on q, k, v and the rest, (b, h, n, .)."""
    if name == "gated delta rule":
        return lambda q, k, v, log, beta: delta_run.attend(q, k, v, beta, log, None, None, False)[0]
    return lambda q, k, v, log=None: state_run.attend(q, k, v, log, None, None, Form())[0]


def peer(name: str) -> Callable[..., Tensor]:
    """The same of `fla`, (b, n, h, .)."""
    if name == "linear attention":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]
    if name == "retention":
        from fla.ops.retention import chunk_retention

        return lambda q, k, v: chunk_retention(q, k, v, scale=1.0)[0]
    if name == "gated linear attention":
        from fla.ops.gla import chunk_gla

        return lambda q, k, v, log: chunk_gla(q, k, v, log, scale=1.0)[0]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, log, beta: chunk_gated_delta_rule(q, k, v, log, beta, scale=1.0)[0]


def for_peer(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """The inputs in the peer's layout; the decay of retention is its own."""
    kept = tensors[:3] if name == "retention" else tensors
    moved = [x.transpose(1, 2).contiguous() for x in kept]
    return [x.squeeze(-1) if x.shape[-1] == 1 else x for x in moved]


def measured(call: Callable[..., Tensor], tensors: list[Tensor], grad: bool) -> dict[str, float]:
    """First call, forward, and forward with backward."""
    found = {"first call s": clock(lambda: call(*tensors))}
    size = 4 * tensors[0].numel() * 2
    found["forward ms"] = timed(lambda: call(*tensors))
    found["forward TB/s"] = size / found["forward ms"] / 1e9
    if grad:
        leaves = [x.detach().requires_grad_(x.shape[0] > 1 or x.dim() < 4 or x.shape[2] > 1) for x in tensors]
        asked = [x for x in leaves if x.requires_grad]
        weight = torch.randn_like(tensors[0])

        def both() -> object:
            return torch.autograd.grad(call(*leaves), asked, weight)

        found["first backward s"] = clock(both)
        found["forward+backward ms"] = timed(both, 9)
    return found


def errors(name: str) -> dict[str, float]:
    """Relative errors of the output at 32,768 tokens, and of gradients at 4,096, of two heads against float64."""
    found = {}
    for length, grad in ((SHAPES[0][1], False), (4096, True)):
        tensors = [x.requires_grad_(grad) for x in inputs(name, 1, length, 2)]
        wide = [x.detach().double().requires_grad_(grad) for x in tensors]
        q, k, v, *rest = wide
        log, beta = rest[0] if rest else None, rest[1] if len(rest) > 1 else None
        state = torch.zeros(1, 2, DIM, DIM, dtype=torch.float64, device="cuda")
        want = gated.advance(q, k, v, log, beta, state, None)[0]
        got = ours(name)(*tensors)
        pairs = {"out": (got, want)}
        if grad:
            weight = torch.randn_like(got)
            mine = torch.autograd.grad(got, tensors, weight)
            true = torch.autograd.grad(want, wide, weight.double())
            names = ("dq", "dk", "dv", "dlog", "dbeta")
            pairs = {n: (x, y) for n, x, y in zip(names, mine, true)}
        for n, (x, y) in pairs.items():
            found[n] = float((x.double() - y).norm() / y.norm())
    return found


def section(name: str, with_peer: bool) -> dict[str, Any]:
    """One mechanism at every shape, ours and the peer's, and how far ours is from float64."""
    found: dict[str, Any] = {"errors": errors(name)}
    for batch, length in SHAPES:
        tensors = inputs(name, batch, length)
        both: dict[str, Any] = {"saccade": measured(ours(name), tensors, True)}
        if with_peer:
            both["fla"] = measured(peer(name), for_peer(name, tensors), name in NAMES[:2])
            both["times fla"] = {
                n: both["fla"][f"{n} ms"] / both["saccade"][f"{n} ms"]
                for n in ("forward", "forward+backward")
                if f"{n} ms" in both["fla"]
            }
        found[f"{batch} x {length}"] = both
        print(name, batch, length, json.dumps(both, indent=1), flush=True)
    return found


def copied() -> float:
    """TB/s of a copy, bytes read and written."""
    x = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / timed(lambda: y.copy_(x)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", default="", help="mechanisms whose name holds this word")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    document: dict[str, Any] = {
        "made_by": "python benchmarks/gpu_recurrent.py", "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(), "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "heads": HEADS, "state": [DIM, DIM], "dtype": "bfloat16", "copy TB/s": copied(),
    }  # fmt: skip
    for name in NAMES:
        if options.only not in name:
            continue
        try:
            document[name] = section(name, not options.no_peer)
        except Exception as error:
            document[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(name, document[name], flush=True)
        torch.cuda.empty_cache()
        (options.out / "gpu_recurrent.json").write_text(
            json.dumps(document, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
