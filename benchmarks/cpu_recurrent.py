"""The bars of recurrent mechanisms on a CPU; writes results/cpu_recurrent.json.

    python benchmarks/cpu_recurrent.py [--quick] [--only WORD]

Batch 1, 8 heads, states of 64 x 64 in float32, 8,192 tokens: causal linear attention beside scaled_dot_product_attention(
is_causal=True) of the same inputs, in turn, medians of the ratios; decays and the delta rule beside causal linear attention;
16,384 tokens beside 8,192. One token on a state in microseconds, and a million tokens through a state, in MiB by which the
process grew.
"""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import saccade as sc
from bars import HEAD_DIM, HEADS, LENGTH, Bar, Measured, beside, paired, qkv, ratio, run, training
from saccade.parts.base import Sizes
from saccade.parts.state import State

BASE = "causal + linear"
DECAYS = (
    "causal + fixed_decay + identity",
    "causal + fixed_decay + elu1 + ratio",
    "causal + gate_decay + identity",
    "causal + step_decay + identity + step_write",
    "causal + channel_decay + identity",
)
DELTAS = ("unit + causal + delta + identity", "unit + causal + delta + step_decay + identity")
SYSTEMS = ("linear", "retention", "mamba2", "gla", "delta_net", "gated_delta_net")
TOKENS, PIECE = 1_000_000, 1000


def mechanism(text: str) -> str:
    """A system's causal form."""
    return "causal + linear" if text == "linear" else text


class Bound:
    """A mechanism with inputs drawn for it, ready to be called."""

    def __init__(self, text: str, length: int, grad: bool = False, seed: int = 1) -> None:
        self.text, self.m = text, sc.mechanism(text)
        generator = torch.Generator().manual_seed(seed)
        sizes = Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM)
        self.inputs = qkv(length, grad=grad)
        self.streams = {
            n: torch.randn(x.shape(1, HEADS, length), generator=generator).requires_grad_(grad)
            for n, x in self.m.streams(sizes).items()
        }
        self.params = {
            n: (torch.ones if x.init == "ones" else torch.zeros)(x.shape).requires_grad_(grad)
            for n, x in self.m.weights(sizes).items()
        }

    @property
    def learned(self) -> list[Tensor]:
        return [*self.inputs, *self.streams.values(), *self.params.values()]

    def out(self, *_: Tensor) -> Tensor:
        return sc.attend(*self.inputs, self.m, params=self.params, streams=self.streams)

    def step(self, state: State) -> State:
        found = sc.attend(
            *self.inputs, self.m, params=self.params, streams=self.streams, state=state, need=("state",)
        )
        assert found.state is not None
        return found.state


def linear(grad: bool, count: int) -> Measured:
    """Causal linear attention over causal SDPA."""
    bound = Bound(BASE, LENGTH, grad)
    full = functools.partial(scaled_dot_product_attention, is_causal=True)
    found = beside(bound.out, lambda *x: full(*x), bound.inputs, count)
    return {**found, "kernel": sc.plan(BASE, (1, HEADS, LENGTH, HEAD_DIM), grad=grad).kernel}


def relative(text: str, other: str, length: int, grad: bool, count: int) -> Measured:
    """A mechanism over another one, or over itself at 8,192 tokens."""
    a, b = Bound(text, length, grad), Bound(other, LENGTH, grad)
    if grad:
        pair = paired(training(a.out, a.learned), training(b.out, b.learned), count)
    else:
        with torch.no_grad():
            pair = paired(a.out, b.out, count)
    return {
        **ratio(*pair),
        "kernel": sc.plan(a.m, (1, HEADS, length, HEAD_DIM), grad=grad).kernel,
    }


def decode(text: str, count: int) -> Measured:
    """Microseconds of one token on a state, output included."""
    bound = Bound(mechanism(text), 1)
    state, found = sc.init_state(bound.m, 1, HEADS, HEAD_DIM), []
    with torch.no_grad():
        for _ in range(200 * count):
            start = time.perf_counter()
            state = bound.step(state)
            found.append(1e6 * (time.perf_counter() - start))
    return {"value": statistics.median(found), "best": min(found), "calls": len(found)}


def resident() -> int:
    """Bytes that the process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def stream(text: str, count: int) -> Measured:
    """MiB by which the process grows over a million tokens, and how far the state is from that of other pieces."""
    bound = Bound(mechanism(text), PIECE)
    ends = []
    with torch.no_grad():
        for sizes in ((PIECE,), (PIECE // 8 + 1, PIECE - PIECE // 8 - 1)):
            state, peak, start = sc.init_state(bound.m, 1, HEADS, HEAD_DIM), 0, time.perf_counter()
            for _ in range(20):
                state = _pieces(bound, state, sizes)
            before, state = resident(), sc.init_state(bound.m, 1, HEADS, HEAD_DIM)
            for _ in range(TOKENS // PIECE):
                state = _pieces(bound, state, sizes)
                peak = max(peak, resident() - before)
            ends.append((state, peak, time.perf_counter() - start))
    (a, grown, seconds), (b, other, _) = ends
    apart = max(
        float((x - b.tensors[n]).abs().max() / x.abs().max()) for n, x in a.tensors.items() if n != "m"
    )
    return {
        "value": max(grown, other) / 2**20,
        "state_apart": apart,
        "seconds": seconds,
        "tokens": a.length,
    }


def _pieces(bound: Bound, state: State, sizes: tuple[int, ...]) -> State:
    """One more stretch of tokens, in pieces of these sizes."""
    q, k, v = bound.inputs
    start = 0
    for size in sizes:
        at = slice(start, start + size)
        start += size
        found = sc.attend(
            q[:, :, at],
            k[:, :, at],
            v[:, :, at],
            bound.m,
            params=bound.params,
            streams={n: x[:, :, at] for n, x in bound.streams.items()},
            state=state,
            need=("state",),
        )
        assert found.state is not None
        state = found.state
    return state


def bars() -> list[Bar]:
    """Every bar of issue 5 that a CPU meets."""
    found: list[Bar] = []
    for grad, bar in ((False, 0.05), (True, 0.07)):
        what = "training" if grad else "forward"
        found.append((f"{BASE} {what} / SDPA causal", functools.partial(linear, grad), "at most", bar))
        for texts, most in ((DECAYS, 1.5), (DELTAS, 4.0)):
            for text in texts:
                call = functools.partial(relative, text, BASE, LENGTH, grad)
                found.append((f"{text} {what} / {BASE}", call, "at most", most))
    for text in (BASE, DECAYS[2], DECAYS[4], DELTAS[1]):
        longer = functools.partial(relative, text, text, 2 * LENGTH, False)
        found.append((f"{text} at 16,384 tokens / at 8,192", longer, "at most", 2.1))
    for text in (*DECAYS, *DELTAS, *SYSTEMS):
        found.append((f"{text} decode, microseconds a token", functools.partial(decode, text), "at most", 60))
    for text in SYSTEMS:
        found.append(
            (f"{text} a million tokens, MiB of growth", functools.partial(stream, text), "at most", 20)
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(run("Recurrent mechanisms on a CPU", "cpu_recurrent", __doc__, bars()))
