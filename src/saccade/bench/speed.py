"""Speed cells: one call forward, with gradients, or one token after a cache, at one length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import saccade as sc
from saccade.bench import measure
from saccade.parts.base import Sizes

_TINY = 64  # tokens of the first call, which pays for what PyTorch sets up once
_SETTLE = 2  # steps before a decode is measured, so that its cache has room


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Times, or the peak of memory, of one kind of call; one job asks for one of the two."""
    device, s = job["device"], job["settings"]
    inputs = Inputs.draw(job)
    _call(job["what"], Inputs.draw(job | {"length": min(_TINY, job["length"])}))()
    if job["measure"] == "time":
        samples = measure.times_ms(_call(job["what"], inputs), device, budget_s=s["seconds"])
        found: dict[str, Any] = {
            "samples_ms": [round(ms, 4) for ms in samples],
            **measure.spread(samples),
            "kernel": inputs.kernel(job["what"]),
        }
    else:
        found = {"peak_bytes": measure.peak_bytes(_call(job["what"], inputs), device)}
    return {f"speed/{job['mechanism']}/{job['what']}/{job['length']}": found}


@dataclass(frozen=True)
class Inputs:
    """What a call takes: q, k and v (batch, heads, length, head_dim) and what the mechanism's parts declare."""

    mechanism: sc.Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    extra: dict[str, dict[str, Tensor]]

    @classmethod
    def draw(cls, job: dict[str, Any]) -> Inputs:
        """Random inputs, those of a backward call with gradients."""
        s = job["settings"]
        m = sc.mechanism(job["text"])
        kv_heads = m.kv_heads(s["heads"])
        generator = torch.Generator().manual_seed(0)
        grad = job["what"] == "backward"

        def ready(x: Tensor) -> Tensor:
            return x.to(job["device"]).requires_grad_(grad)

        def rows(heads: int) -> Tensor:
            return ready(torch.randn(s["batch"], heads, job["length"], s["head_dim"], generator=generator))

        sizes = Sizes(s["heads"], kv_heads, s["head_dim"], s["head_dim"])
        params = {name: ready(w.make(generator)) for name, w in m.weights(sizes).items()}
        buffers = {name: b.to(job["device"]) for name, b in m.buffers(sizes, generator).items()}
        return cls(
            m, rows(s["heads"]), rows(kv_heads), rows(kv_heads), {"params": params, "buffers": buffers}
        )

    def kernel(self, what: str) -> str:
        """The kernel that the plan chooses."""
        batch, heads, length, head_dim = self.q.shape
        rows = 1 if what == "decode" else length
        shape = sc.Shape(batch, heads, rows, head_dim, self.k.shape[1], length)
        return sc.plan(
            self.mechanism,
            shape,
            device=str(self.q.device),
            grad=what == "backward",
            decoding=what == "decode",
        ).kernel


def _call(what: str, x: Inputs) -> Callable[[], object]:
    return {"forward": _forward, "backward": _backward, "decode": _decode}[what](x)


def _forward(x: Inputs) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return sc.attend(x.q, x.k, x.v, x.mechanism, **x.extra)

    return call


def _backward(x: Inputs) -> Callable[[], object]:
    upstream = torch.ones_like(x.q)
    learned = (x.q, x.k, x.v, *x.extra["params"].values())

    def call() -> object:
        out = sc.attend(x.q, x.k, x.v, x.mechanism, **x.extra)
        return torch.autograd.grad(out, learned, upstream)

    return call


@torch.no_grad()
def _decode(x: Inputs) -> Callable[[], object]:
    """One more token a call, each after all that went before."""
    state = sc.attend(x.q, x.k, x.v, x.mechanism, need=("state",), **x.extra).state
    q, k, v = (t[:, :, -1:].contiguous() for t in (x.q, x.k, x.v))

    @torch.no_grad()
    def call() -> object:
        nonlocal state
        out, *_, after, _ = sc.attend(q, k, v, x.mechanism, state=state, need=("state",), **x.extra)
        state = after
        return out

    for _ in range(_SETTLE):
        call()
    return call
