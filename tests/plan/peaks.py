"""Measures the peak memory of calls beside what their plans predict, in a process of its own: JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import saccade as sc
from saccade.bench.measure import peak_bytes
from saccade.parts.base import Sizes

HEADS, DIM = 8, 64


def ready(text: str, length: int, grad: bool) -> tuple[Callable[[], object], int]:
    """A call of a mechanism on fresh inputs, and the peak that its plan predicts."""
    g = torch.Generator().manual_seed(0)
    m = sc.testing.on_tokens(sc.mechanism(text), length)
    groups = m.kv_heads(HEADS)
    sizes = Sizes(HEADS, groups, DIM, DIM)
    q, k, v = (
        torch.randn(1, h, length, DIM, generator=g, requires_grad=grad) for h in (HEADS, groups, groups)
    )
    params = {n: w.make(g).requires_grad_(grad) for n, w in m.weights(sizes).items()}
    buffers = m.buffers(sizes, g)
    upstream = torch.ones_like(q)
    plan = sc.plan(m, sc.Shape(1, HEADS, length, DIM, groups), grad=grad)

    def call() -> object:
        with torch.set_grad_enabled(grad):
            out = sc.attend(q, k, v, m, params=params, buffers=buffers)
        return (
            torch.autograd.grad(out, (q, k, v, *params.values()), upstream, allow_unused=True)
            if grad
            else out
        )

    return call, plan.cost.peak


def measure(case: dict[str, Any]) -> dict[str, Any]:
    text, grad = case["text"], case["grad"]
    ready(text, 64, grad)[0]()
    call, predicted = ready(text, case["length"], grad)
    return {**case, "predicted": predicted, "measured": peak_bytes(call, "cpu")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([measure(case) for case in json.load(sys.stdin)]))
