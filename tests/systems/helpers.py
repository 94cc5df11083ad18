"""What the system checks share: random inputs, a training loop, counters of FLOPs and of temporaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import saccade as sc
from saccade import native
from saccade.tasks.text import Corpus

FRESH = 1000  # seeds from here on were not used to choose settings


def qkv(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    kv: int | None = None,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v."""
    shape = (batch, kv or heads, keys or length, dim)
    return (
        torch.randn(batch, heads, length, dim, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
    )


def dense(q: Tensor, k: Tensor, v: Tensor, exist: Tensor | None = None) -> Tensor:
    """Softmax attention as it is written in a textbook; `exist` is True where a pair may attend."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if exist is not None:
        s = s.masked_fill(~exist, -math.inf)
    return torch.softmax(s, dim=-1) @ v


def below(rows: int, keys: int | None = None) -> Tensor:
    """The causal mask, the last query aligned with the last key."""
    keys = keys or rows
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


def train(
    parameters: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, rate: float = 3e-3
) -> float:
    """AdamW with warm-up, cosine decay and clipped gradients on loss(step); the mean of the last tenth of the losses."""
    owned = list(parameters)
    optimizer = torch.optim.AdamW(owned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    losses = []
    for step in range(steps):
        decay = 0.525 + 0.475 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm) * decay
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(owned, 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def train_on_text(
    model: nn.Module,
    corpus: Corpus,
    steps: int,
    length: int,
    batch: int = 16,
    rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Next-byte prediction on windows of the corpus."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        rows = corpus.batch(batch, length, generator)
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    train(model.parameters(), loss, steps, rate)


@torch.no_grad()
def text_loss(model: nn.Module, corpus: Corpus, length: int, windows: int = 256) -> float:
    """Mean negative log-likelihood of held-out bytes, in nats."""
    found = [
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        for rows in corpus.windows(length)[:windows].split(32)
    ]
    return float(torch.stack(found).mean())


def flops(call: Callable[[], Any]) -> int:
    """Matrix FLOPs that a call really does."""
    with FlopCounterMode(display=False) as counter, native.counting() as engine, torch.no_grad():
        call()
    return counter.get_total_flops() + engine.flops


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def largest_temporary(call: Callable[[], Any]) -> int:
    """Bytes of the largest storage that any operation of a call answers."""
    with _Largest() as largest:
        call()
    return largest.bytes


def stepwise(layer: sc.nn.Attention, x: Tensor) -> tuple[Tensor, list[int]]:
    """A layer's outputs token by token, and the bytes of its state after each."""
    state, outs, held = layer.init_state(x.shape[0]), [], []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        outs.append(y)
        held.append(state.nbytes)
    return torch.cat(outs, dim=1), held


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of log cost against log size."""
    x, y = (torch.tensor(a, dtype=torch.float64).log() for a in (sizes, costs))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
