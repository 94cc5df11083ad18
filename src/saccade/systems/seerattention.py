"""Blocks chosen by a small gate on pooled queries and keys, which a frozen model teaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.blockmap import block_map
from saccade.parts.budget import Budget
from saccade.parts.mask import Causal, Chunk
from saccade.parts.pair import Context, map_tokens, without_padding
from saccade.parts.proxy import Proxy, block_ends, block_mean, last_positions
from saccade.parts.select import TopBlocks
from saccade.parts.tokens import Rope, Rotary
from saccade.plan import Attended

if TYPE_CHECKING:
    from saccade.nn.transformer import Transformer


@dataclass(frozen=True)
class PooledGate(Proxy):
    """Wq mean(q) . Wk [max; min; mean](k), `width` channels a head, both sides turned by the number of their block.

    Pools what q and k were before the rotation `turned`, the one that the mechanism gave them. The loss `gate` is the
    divergence of its softmax over the candidates from the largest true weight in each block, row-normalised; it moves the gate
    alone. (Gao et al., SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, 2024.)
    """

    width: int = arg(32, at_least=2)
    turned: Rotary | None = None
    base: float = arg(10000.0, above=0.0)

    name = "pooled_gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2:
            raise MechanismError(f"pooled_gate turns pairs of channels: width must be even, got {self.width}")

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        d = sizes.head_dim
        return {
            "gate_q": Weight((sizes.heads, d, self.width), std=d**-0.5),
            "gate_k": Weight((sizes.kv_heads, 3 * d, self.width), std=(3 * d) ** -0.5),
        }

    def flops(self, head_dim: int) -> int:
        return 2 * self.width

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        return 2 * sizes.head_dim * self.width

    def prepare(self, c: Context, size: int, rows: int) -> tuple[Tensor, Tensor]:
        q, k = c.q, c.k
        if self.turned is not None:
            q, k = self.turned.undo(q, c.i), self.turned.undo(k, c.j)
        pooled_q = block_mean(q, rows, c.query_valid if rows > 1 else None)
        pooled_k = torch.cat((*block_ends(k, size, c.valid), block_mean(k, size, c.valid)), -1)
        gate_q, gate_k = (c.params[n].to(pooled_q.dtype) for n in ("gate_q", "gate_k"))
        rope = Rope(self.base)
        own = torch.div(last_positions(c, rows), size, rounding_mode="floor")
        numbers = torch.arange(pooled_k.shape[2], device=k.device)[None]
        return rope.map(pooled_q @ gate_q, own, "q", c), rope.map(pooled_k @ gate_k, numbers, "k", c)

    def lessons(self, c: Context, size: int, rows: int, open_: Tensor) -> dict[str, Tensor]:
        gone = None if c.query_valid is None else ~c.query_valid[:, None, :, None]
        q = c.q.detach() if gone is None else c.q.detach().masked_fill(gone, 0)
        c = without_padding(replace(c, q=q, k=c.k.detach()))
        c = map_tokens(() if self.turned is None else (self.turned,), c, c.k.shape[2])
        with torch.no_grad():
            truth = block_map(c, size, rows).largest.masked_fill(~open_, 0)
            total = truth.sum(-1, keepdim=True)
            truth = truth / total.masked_fill(total == 0, 1)
        asked = self.scores(self.prepare(c, size, rows), slice(None), truth.shape[-1])
        told = torch.log_softmax(asked.masked_fill(~open_, torch.finfo(asked.dtype).min), -1)
        each = torch.xlogy(truth, truth) - truth * told
        return {"gate": each.sum() / (total > 0).sum().clamp_min(1)}


@system("seerattention", ref="S265")
def seerattention(
    block: int = 64, top: int | Budget = 4, width: int = 32, rows: int = 1, rope: bool = True
) -> Pairwise:
    """Every query reads its own block and the past blocks that a learned gate on pooled keys scores highest.

    With `rows` above 1 so many queries share a choice by their mean query, as published for prefill; the first of them then
    sees the last, and the mechanism says `leak`. (Gao et al., SeerAttention, 2024.)
    """
    turned = Rope() if rope else None
    choice = TopBlocks(block, top, PooledGate(width, turned), rows)
    tokens = () if turned is None else (turned,)
    return Pairwise(tokens=tokens, pairs=Causal() & (choice | Chunk(block)))


def gate_loss(frozen: Transformer, gated: Transformer, tokens: Tensor) -> Tensor:
    """What the gates of one model miss of the attention of another of the same weights, summed over the blocks.

    Every layer sees what it sees in the frozen model, so that gates learn side by side; tokens are (B, L).
    """
    total = torch.zeros((), device=tokens.device)
    with torch.no_grad():
        x = frozen.embedding(tokens)
    for own, other in zip(frozen.blocks, gated.blocks, strict=True):
        with torch.no_grad():
            seen, after = own.norm1(x), own(x)
        found = other.attention(seen, need=("losses",))
        assert isinstance(found, Attended)
        total = total + (found.losses or {})["gate"]
        x = after
    return total
