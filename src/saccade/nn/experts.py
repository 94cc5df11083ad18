"""Sparse mixtures of experts whose router looks at a graph of tokens: similar ones, or those that attention reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.mechanism import Mechanism
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import Attention
from saccade.parts.state import State
from saccade.plan import attend, init_state

GRAPHS = ("none", "similarity", "attention")


def route_flips(a: Tensor, b: Tensor) -> float:
    """The share of tokens whose likeliest expert differs between two sets of odds (..., experts)."""
    return float((a.argmax(-1) != b.argmax(-1)).float().mean())


class SparseExperts(nn.Module):
    """Each token passes through the `top` experts of the greatest odds, weighted by those odds, brought to a sum of one.

    x (..., dim) and odds (..., experts) to (..., dim); the odds are those of the own router unless given. (Shazeer et al.,
    Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, 2017.)
    """

    def __init__(self, dim: int, experts: int, top: int = 2, hidden: int | None = None) -> None:
        super().__init__()
        if dim < 1 or not 1 <= top <= experts:
            raise ValueError(
                f"top experts must be 1 to experts={experts} and dim at least 1, got {top}, {dim}"
            )
        self.top, inner = top, hidden or 4 * dim
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim)) for _ in range(experts)
        )

    def odds(self, x: Tensor) -> Tensor:
        """The router's probability of each expert, (..., experts)."""
        return torch.softmax(self.router(x), -1)

    def forward(self, x: Tensor, odds: Tensor | None = None) -> Tensor:
        p = self.odds(x) if odds is None else odds
        weight, chosen = p.topk(self.top, -1)
        weight, tokens = weight / weight.sum(-1, keepdim=True), x.reshape(-1, x.shape[-1])
        weight, chosen = weight.reshape(-1, self.top), chosen.reshape(-1, self.top)
        out = torch.zeros_like(tokens)
        for n, expert in enumerate(self.experts):
            rows, slot = (chosen == n).nonzero(as_tuple=True)
            out = out.index_add(0, rows, weight[rows, slot, None] * expert(tokens[rows]))
        return out.view_as(x)

    def balance(self, odds: Tensor, real: Tensor | None = None) -> Tensor:
        """experts * sum_e f_e P_e over real tokens: 1 where choices f and odds P are even (Fedus et al., Switch Transformers, 2021)."""
        count = odds.shape[-1]
        rows = odds.reshape(-1, count) if real is None else odds[real]
        chosen = F.one_hot(rows.topk(self.top, -1).indices, count).sum(1).to(rows.dtype)
        return count * (chosen.mean(0) / self.top * rows.mean(0)).sum()


@dataclass(frozen=True)
class ExpertState:
    """What decoding keeps: the state of attention, and that of the graph over which odds are averaged."""

    attention: State
    graph: State | None


class GraphExperts(nn.Module):
    """x + attention(norm x), then x + experts(norm x), whose odds are averaged over a graph of tokens; x (B, n, dim).

    p_i = sum_j S_ij g_j with g the router's odds. `similarity`: S is the softmax of u_i.W u_j / tau over tokens u, W the
    identity at first. `attention`: S is the mean over heads of the block's own weights. `none`: p = g. The odds stand as
    values, so no weights are ever held. (Nguyen et al., Improving Routing in Sparse Mixture of Experts with Graph of Tokens,
    2025.)

    >>> block = GraphExperts(32, heads=4, experts=4, graph="attention", mechanism="causal")
    >>> block(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        experts: int,
        *,
        top: int = 2,
        graph: str = "attention",
        tau: float = 1.0,
        mechanism: str | Mechanism = "full",
    ) -> None:
        super().__init__()
        if graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, got {graph!r}")
        if tau <= 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.experts = Attention(dim, heads, mechanism), SparseExperts(dim, experts, top)
        self.graph, self.tau = graph, tau
        self.similar = nn.Parameter(torch.eye(dim)) if graph == "similarity" else None
        self.pairs = parse("causal" if self.attention.mechanism.causal else "full")

    def average(
        self, g: Tensor, u: Tensor, x: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """The odds g (B, n, experts) of tokens u averaged over the graph, and the state after; attention read x."""
        if self.graph == "none":
            return g, None
        need = ("out",) if state is None else ("out", "state")
        if self.similar is not None:
            q = (u @ self.similar)[:, None] * (math.sqrt(u.shape[-1]) / self.tau)
            found = attend(q, u[:, None], g[:, None], self.pairs, key_lengths=lengths, state=state, need=need)
        else:
            layer = self.attention
            q, k, _ = layer.project(x)
            keys = x.shape[1] + (0 if state is None else state.length)
            found = attend(
                q,
                k,
                g[:, None].expand(-1, k.shape[1], -1, -1),
                layer.mechanism,
                key_lengths=lengths,
                state=state,
                need=need,
                params=layer._params(),
                streams={n: net(x, keys if lengths is None else lengths) for n, net in layer.streams.items()},
                buffers=layer._buffers_of(),
            )
        out, after = (found, None) if isinstance(found, Tensor) else (found.out, found.state)
        return out.mean(1), after

    def forward(
        self, x: Tensor, *, key_lengths: Tensor | None = None, losses: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The features; later tokens than `key_lengths` (B,) are padding. The balance loss is added to `losses`."""
        read = self.norm1(x)
        x = x + self.attention(read, key_lengths=key_lengths)
        u = self.norm2(x)
        odds, _ = self.average(self.experts.odds(u), u, read, key_lengths)
        if losses is not None:
            real = (
                None
                if key_lengths is None
                else torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
            )
            losses["balance"] = losses.get("balance", 0.0) + self.experts.balance(odds, real)
        return x + self.experts(u, odds)

    def init_state(self, batch: int) -> ExpertState:
        """The state before the first token. Raises NotSupported for a mechanism that cannot decode step by step."""
        s, like = self.attention.sizes, self.norm1.weight
        experts, dtype, device = len(self.experts.experts), like.dtype, like.device
        own = self.attention.init_state(batch)
        if self.graph == "none":
            return ExpertState(own, None)
        if self.similar is not None:
            graph = init_state(self.pairs, batch, 1, len(like), experts, dtype=dtype, device=device)
            return ExpertState(own, graph)
        graph = init_state(
            self.attention.mechanism,
            batch,
            s.kv_heads,
            s.head_dim,
            experts,
            heads=s.heads,
            dtype=dtype,
            device=device,
        )
        return ExpertState(own, graph)

    def step(self, x: Tensor, state: ExpertState) -> tuple[Tensor, ExpertState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        read = self.norm1(x)
        mixed, own = self.attention.step(read, state.attention)
        x = x + mixed
        u = self.norm2(x)
        odds, graph = self.average(self.experts.odds(u), u, read, state=state.graph)
        return x + self.experts(u, odds), ExpertState(own, graph)
