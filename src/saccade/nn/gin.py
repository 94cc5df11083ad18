"""Attention weights read as the edges of a graph, by graph isomorphism layers: in place of attention, or beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism
from saccade.nn.attention import Attention
from saccade.nn.graphs import perceptron
from saccade.nn.transformer import Block

AGGREGATES = ("sum", "mean", "max", "min", "std")


def edges_of(weights: Tensor, threshold: float | None, binary: bool) -> tuple[Tensor, Tensor]:
    """Edge weights and which edges are kept, both (..., L, S): those above the threshold, all of weight 1 if binary.

    A binary edge passes its gradient to the weight that it stands for.
    """
    kept = weights > (0 if threshold is None else threshold)
    edges = weights * kept
    if binary:
        edges = kept.to(weights.dtype) + (edges - edges.detach())
    return edges, kept


def aggregate(how: str, edges: Tensor, kept: Tensor, x: Tensor) -> Tensor:
    """What the kept neighbours x (..., S, d) of each node come to, (..., L, d); zeros for a node that has none.

    "sum" and "mean" weigh by edges (..., L, S); "max", "min" and the standard deviation "std" look at who is kept, in
    O(L S d) memory. (Corso et al., Principal Neighbourhood Aggregation for Graph Nets, 2020.)
    """
    if how == "sum":
        return edges @ x
    if how == "mean":
        total = edges.sum(-1, keepdim=True)
        return (edges @ x) / total.where(total > 0, torch.ones_like(total))
    lonely = ~kept.any(-1)[..., None]
    if how == "std":
        count = kept.sum(-1, keepdim=True).clamp_min(1)
        mean = (kept.to(x.dtype) @ x) / count
        gap = (x.unsqueeze(-3) - mean.unsqueeze(-2)) * kept.unsqueeze(-1)
        variance = gap.square().sum(-2) / count
        spread = variance > 0
        return variance.where(spread, torch.ones_like(variance)).sqrt() * spread
    sign = 1 if how == "max" else -1
    found = (sign * x).unsqueeze(-3).masked_fill(~kept.unsqueeze(-1), -torch.inf)
    most = found.amax(-2) if x.shape[-2] else x.new_zeros(*lonely.shape[:-1], x.shape[-1])
    return sign * most.masked_fill(lonely, 0)


class GINAttention(nn.Module):
    """mlp((1 + eps) v + A v), A the attention weights above `threshold` as edges of a graph: (B, L, dim) to itself.

    Several aggregates, of sum, mean, max, min and std, stand side by side before the mlp; with `degrees` also times
    log(1 + degree) and over it. `binary` gives each kept edge the weight 1: only then does a sum count how many
    neighbours are alike. `hidden=0` makes the mlp one linear map, and with eps = -1 the layer is plain attention. A
    node without an edge keeps (1 + eps) v. (Buehler, Graph-Aware Isomorphic Attention for Adaptive Dynamics in
    Transformers, 2025; the mlp and eps from Xu et al., How Powerful are Graph Neural Networks?, 2019.)

    >>> GINAttention(16, heads=2, threshold=0.1, binary=True)(torch.zeros(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "full",
        threshold: float | None = None,
        binary: bool = False,
        aggregates: Sequence[str] = ("sum",),
        degrees: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"threshold is compared with weights and must lie in [0, 1), got {threshold}")
        unknown = set(aggregates) - set(AGGREGATES)
        if unknown or not aggregates:
            raise ValueError(
                f"aggregates must name one or more of {', '.join(AGGREGATES)}, got {tuple(aggregates)}"
            )
        self.threshold, self.binary = threshold, binary
        self.aggregates, self.degrees = tuple(aggregates), degrees
        self.attention = Attention(dim, heads, mechanism)
        width = self.attention.out_proj.in_features
        self.attention.out_proj = nn.Identity()  # type: ignore[assignment]
        self.eps = nn.Parameter(torch.zeros(()))
        terms = len(self.aggregates) * (3 if degrees else 1)
        self.mlp = perceptron(width * terms, 2 * dim if hidden is None else hidden, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
        """Nodes x (B, L, dim); mask and key_lengths as in `saccade.attend`."""
        found = self.attention(x, mask=mask, key_lengths=key_lengths, need=("weights",))
        assert not isinstance(found, Tensor)
        assert found.weights is not None
        edges, kept = edges_of(found.weights, self.threshold, self.binary)
        v = self.attention.project(x)[2]
        v = v.repeat_interleave(edges.shape[1] // v.shape[1], dim=1).to(edges.dtype)
        if key_lengths is not None:
            gone = torch.arange(v.shape[2], device=v.device) >= key_lengths[:, None]
            v = v.masked_fill(gone[:, None, :, None], 0)
        terms = [aggregate(how, edges, kept, v) for how in self.aggregates]
        if self.degrees:
            degree = torch.log1p(kept.sum(-1, keepdim=True).to(v.dtype))
            over = degree.where(degree > 0, torch.ones_like(degree))
            terms = [scaled for t in terms for scaled in (t, t * degree, t / over)]
        own = (1 + self.eps) * v
        return self.mlp(torch.cat([own + t for t in terms], dim=-1).transpose(1, 2).flatten(2).to(x.dtype))


class GINAdapter(nn.Module):
    """layer(x) + lam * mlp((1 + eps) x + A x), A the layer's weights, mean over heads, above `threshold`.

    lam starts at 0, so that a tuned model starts as the frozen one. (Buehler, Graph-Aware Isomorphic Attention, 2025.)
    """

    def __init__(self, layer: Attention, dim: int, hidden: int, threshold: float = 0.05) -> None:
        super().__init__()
        self.layer, self.threshold = layer, threshold
        self.eps, self.lam = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.mlp = perceptron(dim, hidden, dim)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """x (B, L, dim) to (B, L, dim)."""
        found = self.layer(x, key_lengths=key_lengths, need=("out", "weights"))
        assert not isinstance(found, Tensor)
        assert found.weights is not None
        edges, _ = edges_of(found.weights.mean(1).detach(), self.threshold, binary=False)
        if key_lengths is not None:
            gone = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
            x = x.masked_fill(gone.unsqueeze(-1), 0)
        heard = (edges @ x.to(edges.dtype)).to(x.dtype)
        return found.out + self.lam * self.mlp((1 + self.eps) * x + heard)

    def init_state(self, batch: int) -> None:
        """Raises NotSupported: the graph of earlier nodes is not kept."""
        raise NotSupported(
            "a GIN adapter reads whole sequences and keeps no state; call the model on the whole sequence"
        )


def add_gin_adapters(model: nn.Module, hidden: int, threshold: float = 0.05) -> list[nn.Parameter]:
    """Freezes a model of saccade.nn blocks and puts a GINAdapter around each attention; the adapters' parameters.

    (Buehler, Graph-Aware Isomorphic Attention, 2025.)
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block of saccade.nn.Transformer, Encoder or EncoderDecoder"
        )
    model.requires_grad_(False)
    tuned: list[nn.Parameter] = []
    for block in blocks:
        layer = block.attention
        adapter = GINAdapter(layer, layer.out_proj.out_features, hidden, threshold).to(layer.out_proj.weight)
        block.attention = adapter  # type: ignore[assignment]
        tuned += [adapter.eps, adapter.lam, *adapter.mlp.parameters()]
    return tuned
