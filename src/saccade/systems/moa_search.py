"""Which window each head of a trained model needs: the influence of its weights on the loss, and a search over rules.

(Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, 2024.)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.mechanism import Pairwise
from saccade.nn import Attention
from saccade.parts.algebra import static_exist
from saccade.parts.pair import Context, Program, map_tokens
from saccade.systems.moa_sparse import Elastic

Rule = tuple[int, float]


def influence(weights: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss where one weight is removed and its row renormalised, entry by entry.

    weights (..., L, S) with rows that sum to 1 and grad, the gradient of the loss in them. A row of one key gives 0.
    """
    left = 1 - weights
    share = torch.where(left > 1e-9, weights / left.clamp_min(1e-9), 0.0)
    return share * ((grad * weights).sum(-1, keepdim=True) - grad)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every self-attention layer computes its weights (B, H, L, L) whole and keeps them with their gradient."""
    kept: list[Tensor] = []
    layers = [x for x in model.modules() if isinstance(x, Attention)]

    def forward_of(layer: Attention) -> Callable[..., Tensor]:
        def forward(x: Tensor, **options: Any) -> Tensor:
            m = layer.mechanism
            assert isinstance(m, Pairwise)
            q, k, v = layer.project(x)
            program = Program.bind(
                m, map_tokens(m.tokens, Context(q, k, v, params=layer._params()), k.shape[2])
            )
            t = program.tile(slice(0, program.rows), [(0, program.keys)])
            w, _ = program.weights(t)
            w.retain_grad()
            kept.append(w)
            return layer._merge(program.mix(w, t).to(q.dtype))

        return forward

    for layer in layers:
        layer.forward = forward_of(layer)  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        for layer in layers:
            del layer.forward


def profile(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The mean size of the influence (H, L, L) of each attention layer's weights on the loss of one batch.

    Its size and not its sign: in a model trained to a stationary point the signed influence of a head averages to zero.
    """
    with watched(model) as kept:
        loss().backward()
    model.zero_grad()
    return [influence(w.detach(), w.grad).abs().mean(0) for w in kept if w.grad is not None]


@dataclass(frozen=True)
class Found:
    """A rule (alpha, beta) for every head of every layer, what it costs in loss, and its mean share of the length."""

    rules: tuple[tuple[Rule, ...], ...]
    cost: float
    share: float


def search(
    profiles: Mapping[int, Sequence[Tensor]],
    share: float,
    alphas: Sequence[int] = (1, 4, 16, 64),
    betas: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
    sinks: int = 0,
) -> Found:
    """The rules that lose least of the influence at all profiled lengths while spans fill at most `share` of the length.

    `profiles` maps a length to the influence of each layer there. The constraint is on the mean over heads, at every
    length; it is priced by a multiplier, and what is left of the budget goes where it saves most.
    """
    rules = list(itertools.product(alphas, betas))
    heads = [(layer, h) for layer, e in enumerate(next(iter(profiles.values()))) for h in range(e.shape[0])]
    spans = torch.tensor(
        [[Elastic(a, b).span(n) / n for n in profiles] for a, b in rules], dtype=torch.float64
    )
    losses = torch.zeros(len(heads), len(rules), dtype=torch.float64)
    for n, layers in profiles.items():
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        for at, (a, b) in enumerate(rules):
            gone = ~static_exist(Elastic(a, b), i, j) & (j >= sinks) & (j <= i)
            for row, (layer, h) in enumerate(heads):
                losses[row, at] += float(layers[layer][h][gone].double().sum())
    if float(spans.min(0).values.max()) > share:
        raise ValueError(
            f"no rule fits into {share:g} of the length: the smallest takes {float(spans.min(0).values.max()):.2g}"
        )

    def fits(chosen: Tensor) -> bool:
        return bool((spans[chosen].mean(0) <= share + 1e-12).all())

    price, chosen = 1e-9, losses.argmin(1)
    while not fits(chosen) and price < 1e12:
        chosen = (losses + price * spans.mean(1)).argmin(1)
        price *= 1.2
    better = True
    while better:
        better = False
        gains = losses.gather(1, chosen[:, None]) - losses
        for flat in gains.flatten().argsort(descending=True).tolist():
            row, at = divmod(flat, len(rules))
            moved = chosen.clone()
            moved[row] = at
            if float(gains[row, at]) <= 1e-15:
                break
            if fits(moved):
                chosen, better = moved, True
                break
    by_layer: dict[int, list[Rule]] = {}
    for (layer, _), at in zip(heads, chosen.tolist(), strict=True):
        by_layer.setdefault(layer, []).append(rules[at])
    cost = float(losses.gather(1, chosen[:, None]).sum())
    return Found(tuple(map(tuple, by_layer.values())), cost, float(spans[chosen].mean(0).max()))
