"""The bars of the native CPU engine; writes results/cpu_native.json.

    python benchmarks/cpu_native.py [--quick] [--only WORD]

Batch 1, 8 heads, head_dim 64, 8,192 tokens: each mechanism beside scaled_dot_product_attention(is_causal=True) of the same
inputs, in turn, medians of the ratios. `dense` bars are times faster, the others a share of that time. The gate's bar is what choosing
adds to the attention over the blocks chosen.
"""

from __future__ import annotations

import functools
import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from bars import HEAD_DIM, HEADS, Bar, Measured, beside, qkv, run
from saccade import native
from saccade.parts.base import Sizes

CASES: tuple[tuple[str, torch.dtype, bool, str, float], ...] = (
    ("causal", torch.float32, False, "at least", 2.2),
    ("causal", torch.bfloat16, False, "at least", 3.5),
    ("causal", torch.float32, True, "at least", 1.8),
    ("causal", torch.bfloat16, True, "at least", 2.5),
    ("window(256)", torch.float32, False, "at most", 0.07),
    ("window(256)", torch.bfloat16, False, "at most", 0.035),
    ("window(256)", torch.float32, True, "at most", 0.09),
    ("moba(block=64, top=8)", torch.float32, False, "at most", 0.12),
    ("moba(block=64, top=8)", torch.float32, True, "at most", 0.16),
)


def engine(text: str, dtype: torch.dtype, grad: bool, faster: bool, count: int) -> Measured:
    """A mechanism's time over that of causal SDPA, or the other way round."""
    inputs = [x.detach().to(dtype).requires_grad_(grad) for x in qkv()]
    mine = functools.partial(sc.attend, mechanism=text)
    full = functools.partial(scaled_dot_product_attention, is_causal=True)

    def there(*qkv: torch.Tensor) -> torch.Tensor:
        return full(*qkv).to(qkv[0].dtype)

    found = beside(there, mine, inputs, count) if faster else beside(mine, there, inputs, count)
    p = sc.plan(text, (1, *inputs[0].shape[1:]), dtype=dtype, grad=grad)
    return {**found, "kernel": p.kernel, "isa": native.isa()}


def decode(kv: int, count: int) -> Measured:
    """One token of 32 heads against 32,768 keys of `kv` heads, beside SDPA on expanded keys: times faster."""
    q, k, v = qkv(32768, heads=32, kv=kv, rows=1)
    wide = [x.repeat_interleave(32 // kv, 1) for x in (k, v)]
    with torch.no_grad():
        pair = beside(
            lambda *_: scaled_dot_product_attention(q, *wide),
            lambda *_: sc.attend(q, k, v, "causal"),
            [q],
            5 * count,
        )
    return {**pair, "kernel": sc.plan("causal", sc.Shape(1, 32, 1, 64, kv, 32768)).kernel}


def gate(dtype: torch.dtype, count: int) -> Measured:
    """What SeerAttention's learned gate adds to its attention over the blocks that it chose, as a share of that."""
    m = sc.mechanism("seerattention(64, top=8)")
    declared = m.weights(Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM))
    params = {n: w.make(torch.Generator().manual_seed(0)).to(dtype) for n, w in declared.items()}
    inputs = [x.to(dtype) for x in qkv()]
    call = functools.partial(sc.attend, mechanism=m, params=params)
    with torch.no_grad():
        chosen = call(*inputs, need=("selection",)).selection
    found = beside(call, functools.partial(call, selection=chosen), inputs, count)
    each = [x - 1 for x in found["samples"]]  # type: ignore[attr-defined]
    p = sc.plan(m, (1, *inputs[0].shape[1:]), dtype=dtype)
    return {
        **found,
        "value": statistics.median(each),
        "samples": each,
        "kernel": p.kernel,
        "isa": native.isa(),
    }


def bars() -> list[Bar]:
    """Every case, one-token decode, and a learned gate."""
    found: list[Bar] = []
    for text, dtype, grad, sense, bar in CASES:
        what = f"{str(dtype).removeprefix('torch.')}, {'training' if grad else 'forward'}"
        name = f"{text} {what}, {'times faster than SDPA' if sense == 'at least' else '/ SDPA causal'}"
        found.append((name, functools.partial(engine, text, dtype, grad, sense == "at least"), sense, bar))
    found.append(
        (
            "one-token decode of 32 heads on 4, times faster than SDPA",
            functools.partial(decode, 4),
            "at least",
            4,
        )
    )
    for dtype in (torch.float32, torch.bfloat16):
        what = str(dtype).removeprefix("torch.")
        name = f"seerattention(64, top=8) {what}, forward: its gate over its attention to the blocks chosen"
        found.append((name, functools.partial(gate, dtype), "at most", 0.25))
    return found


if __name__ == "__main__":
    if not native.available():
        sys.exit(f"the native engine {native.reason()}")
    sys.exit(run("Native CPU engine", "cpu_native", __doc__, bars()))
