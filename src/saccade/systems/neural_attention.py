"""Scores by a small network on each pair of a query and a key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.score import Score

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile


@dataclass(frozen=True)
class PairMLP(Score):
    """s = w.relu(...relu(W1 [Pq q; Pk k] + b1)...) + b with `depth` hidden layers, `hidden` wide, that all heads share.

    Pq and Pk project each head to `hidden` numbers. W1 splits into a part for the query and one for the key, so that a
    pair costs an addition there and no concatenation.
    """

    hidden: int = arg(4, at_least=1)
    depth: int = arg(2, at_least=1)

    name = "pair_mlp"
    breaks = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        p, d = self.hidden, sizes.head_dim
        std = math.sqrt(2 / p)
        found = {
            "pair_q": Weight((sizes.heads, d, p), std=1 / math.sqrt(d)),
            "pair_k": Weight((sizes.kv_heads, d, p), std=1 / math.sqrt(d)),
            "pair_1": Weight((2 * p, p), std=1 / math.sqrt(p)),
            "pair_1_bias": Weight((p,), init="zeros"),
        }
        for n in range(2, self.depth + 1):
            found |= {f"pair_{n}": Weight((p, p), std=std), f"pair_{n}_bias": Weight((p,), init="zeros")}
        return found | {"pair_out": Weight((p, 1), std=std), "pair_out_bias": Weight((1,), init="zeros")}

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        first = c.params["pair_1"].to(c.q.dtype)
        for_q, for_k = first[: self.hidden], first[self.hidden :]
        q = c.q @ (c.params["pair_q"].to(c.q.dtype) @ for_q) + c.params["pair_1_bias"].to(c.q.dtype)
        return q, c.k @ (c.params["pair_k"].to(c.k.dtype) @ for_k)

    def tile(self, t: Tile) -> Tensor:
        b, h, rows, p = t.q.shape
        g, keys = t.k.shape[1], t.k.shape[2]
        x = torch.relu(t.q.reshape(b, g, h // g * rows, 1, p) + t.k[:, :, None])
        for n in range(2, self.depth + 1):
            x = torch.relu(x @ t.params[f"pair_{n}"].to(x.dtype) + t.params[f"pair_{n}_bias"].to(x.dtype))
        s = x @ t.params["pair_out"].to(x.dtype) + t.params["pair_out_bias"].to(x.dtype)
        return s.view(b, h, rows, keys)

    def pair_flops(self, head_dim: int) -> int:
        return 2 * self.hidden * (1 + (self.depth - 1) * self.hidden)

    def token_flops(self, head_dim: int) -> tuple[int, int]:
        return 2 * head_dim * self.hidden, 2 * head_dim * self.hidden

    def temporaries(self, head_dim: int) -> int:
        return (1 + self.depth) * self.hidden


@system("neural_attention", ref="S116")
def neural_attention(hidden: int = 4) -> Pairwise:
    """Softmax over scores of a network with two hidden layers (Neural Attention: A Novel Mechanism for Enhanced Expressive Power, 2025)."""
    return Pairwise(score=PairMLP(hidden))
