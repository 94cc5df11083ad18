"""Speed cells: one call forward, with gradients, or one token after a cache, at one length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import saccade as sc
from saccade.bench import measure
from saccade.mechanism import draw_named
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
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    streams: dict[str, Tensor]

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

        def rows(heads: int, length: int = job["length"]) -> Tensor:
            return ready(torch.randn(s["batch"], heads, length, s["head_dim"], generator=generator))

        sizes = Sizes(s["heads"], kv_heads, s["head_dim"], s["head_dim"])
        named = draw_named(m, sizes, s["batch"], job["length"], generator)
        return cls(
            m,
            rows(s["heads"], 1) if m.learned_query else rows(s["heads"]),
            rows(kv_heads),
            rows(kv_heads),
            {name: ready(x) for name, x in named["params"].items()},
            {name: x.to(job["device"]) for name, x in named["buffers"].items()},
            {name: ready(x) for name, x in named["streams"].items()},
        )

    def attend(self) -> Tensor:
        """The whole call."""
        return sc.attend(
            self.q,
            self.k,
            self.v,
            self.mechanism,
            params=self.params,
            buffers=self.buffers,
            streams=self.streams,
        )

    def advance(self, state: sc.State | None) -> sc.State:
        """The state after a call that goes on from `state`; its output is made and dropped."""
        after = sc.attend(
            self.q,
            self.k,
            self.v,
            self.mechanism,
            state=state,
            need=("state",),
            params=self.params,
            buffers=self.buffers,
            streams=self.streams,
        ).state
        assert after is not None
        return after

    def latest(self) -> Inputs:
        """The same with the last token alone."""
        q, k, v = (x[:, :, -1:].contiguous() for x in (self.q, self.k, self.v))
        streams = {name: x[:, :, -1:].contiguous() for name, x in self.streams.items()}
        return replace(self, q=q, k=k, v=v, streams=streams)

    def kernel(self, what: str) -> str:
        """The kernel that the plan chooses."""
        batch, heads, rows, head_dim = self.q.shape
        shape = sc.Shape(batch, heads, 1 if what == "decode" else rows, head_dim, *self.k.shape[1:3])
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
        return x.attend()

    return call


def _backward(x: Inputs) -> Callable[[], object]:
    upstream = x.v.new_ones(*x.q.shape[:2], *x.v.shape[2:])
    learned = (x.q, x.k, x.v, *x.params.values(), *x.streams.values())

    def call() -> object:
        return torch.autograd.grad(x.attend(), learned, upstream, allow_unused=True)

    return call


@torch.no_grad()
def _decode(x: Inputs) -> Callable[[], object]:
    """One more token a call, each after all that went before."""
    state = x.advance(None)
    token = x.latest()

    @torch.no_grad()
    def call() -> object:
        nonlocal state
        state = token.advance(state)
        return state

    for _ in range(_SETTLE):
        call()
    return call
