"""Peak memory of what is no plain softmax, beside the whole matrices; writes results/memory.json or memory_cuda.json.

    python benchmarks/memory.py [--device cuda] [--only WORD]

Batch 1, 2 heads of 64, 8,192 tokens, float32, forward and backward, a fresh process for each.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

from bars import Bar, Measured, run

TEXTS = (
    "causal + entmax",
    "sparsemax",
    "causal + sigmoid",
    "causal + rela",
    "causal + softcap(30)",
    "causal + relu",
    "neural_attention",
    "causal + neural_attention",
    "causal + tapa",
    "causal + mta",
    "comateformer",
    "causal + cope_contextual(16)",
    "causal + shaw_rpr(64)",
    "causal + nap",
    "relaxed_attention",
    "adaptive_attention",
)

CODE = """
import json, sys
import torch, saccade as sc
from saccade import reference
from saccade.bench.measure import peak_bytes
from saccade.parts.base import Sizes
text, device, whole = sys.argv[1], sys.argv[2], sys.argv[3] == "whole"
m = sc.mechanism(text)

def call(length):
    g = torch.Generator().manual_seed(0)
    sizes = Sizes(2, 2, 64, 64)
    qkv = [torch.randn(1, 2, length, 64, generator=g).to(device).requires_grad_() for _ in range(3)]
    named = {
        "params": {n: w.make(g).to(device).requires_grad_() for n, w in m.weights(sizes).items()},
        "streams": {n: torch.rand(s.shape(1, 2, length), generator=g).to(device) for n, s in m.streams(sizes).items()},
        "buffers": {n: b.to(device) for n, b in m.buffers(sizes, g).items()},
    }
    inputs = [*qkv, *named["params"].values()]
    attend = reference.attend if whole else sc.attend
    return lambda: torch.autograd.grad(attend(*qkv, m, **named).sum(), inputs, allow_unused=True)

call(256)()
print(json.dumps(peak_bytes(call(8192), device)))
"""


def peak(text: str, device: str, how: str) -> int:
    """Bytes of one call in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, text, device, how]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{text} ({how}) ended with {done.returncode}: {done.stderr[-600:]}")
    return json.loads(done.stdout)


def share(mine: Future[int], whole: Future[int], count: int) -> Measured:
    """The peak of a call over that of its definition with whole matrices."""
    return {"value": mine.result() / whole.result(), "bytes": mine.result(), "whole_bytes": whole.result()}


def bars(device: str) -> list[Bar]:
    """One bar a mechanism; on a GPU, where memory is counted by the allocator, several processes at once."""
    pool = ThreadPoolExecutor(1 if device == "cpu" else 4)
    found: list[Bar] = []
    for text in TEXTS:
        both = (pool.submit(peak, text, device, how) for how in ("mine", "whole"))
        found.append((text, functools.partial(share, *both), "at most", 0.1))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    options, rest = parser.parse_known_args()
    sys.exit(
        run("Peak memory over whole matrices", "memory", __doc__, bars(options.device), options.device, rest)
    )
