"""Fewer key-value heads out of a trained multi-head layer: by means, or by learned weights that fold away."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise, Recurrent
from saccade.nn.attention import Attention
from saccade.parts.base import Sizes
from saccade.parts.heads import GroupedQuery, shared_heads

PROJECTIONS = ("key_proj", "value_proj")
FORMS = ("head", "column", "row")


def pool_heads(weight: Tensor, heads: int, kv: int, shares: Tensor | None = None) -> Tensor:
    """Rows of `heads` heads, (heads x d, ...), as those of `kv` heads: weighted sums of consecutive groups.

    `shares` is broadcastable to (kv, heads / kv, d, ...), all 1 / group size unless given: the mean. (Ainslie et al., GQA,
    2023.) Raises ValueError where the head counts do not divide.
    """
    if heads % kv or weight.shape[0] % heads:
        raise ValueError(
            f"{weight.shape[0]} rows of {heads} heads cannot be pooled to {kv} heads; the counts must divide"
        )
    grouped = weight.view(kv, heads // kv, weight.shape[0] // heads, *weight.shape[1:])
    return (grouped.mean(1) if shares is None else (grouped * shares).sum(1)).flatten(0, 1)


def pool_state(state: dict[str, Tensor], heads: int, kv: int) -> dict[str, Tensor]:
    """A state dict with every layer's key and value projections pooled to `kv` heads by their means; the rest is copied.

    Projections are recognised by the names that `Attention` gives them.
    """
    pooled = tuple(f"{p}.{x}" for p in PROJECTIONS for x in ("weight", "bias"))
    return {n: pool_heads(x, heads, kv) if n.endswith(pooled) else x.clone() for n, x in state.items()}


def grouped(layer: Attention, kv: int) -> Attention:
    """A copy of a multi-head layer with `kv` key-value heads, each the mean of a group (Ainslie et al., GQA, 2023).

    With as many heads as before it computes the same. Raises NotSupported for a layer that shares heads already or
    learns something for every key-value head.
    """
    small = _with_heads(layer, kv)
    for name in PROJECTIONS:
        net = getattr(small, name)
        for what, x in net.named_parameters():
            setattr(net, what, nn.Parameter(pool_heads(x.detach(), layer.sizes.heads, kv)))
        net.out_features = net.weight.shape[0]
    return small


class HeadPool(nn.Module):
    """Rows of all heads to those of fewer: learned weights of each member of a group, which start as the mean.

    `head`: one weight a head; `column`: one a channel of the head; `row`: one an input feature.
    """

    def __init__(self, heads: int, kv: int, head_dim: int, inputs: int, form: str) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        own = {"head": (1, 1), "column": (head_dim, 1), "row": (1, inputs)}[form]
        self.shares = nn.Parameter(torch.full((kv, heads // kv, *own), kv / heads))

    def forward(self, x: Tensor) -> Tensor:
        """A weight (heads x d, inputs) or a bias (heads x d,) of fewer heads."""
        if x.dim() == 2:
            return pool_heads(x, self.heads, self.kv, self.shares)
        return pool_heads(x, self.heads, self.kv, self.shares.mean(-1))


def weighted(layer: Attention, kv: int, form: str = "head") -> Attention:
    """A copy of a multi-head layer whose key-value heads are learned sums of its groups, to be trained and then folded.

    It starts as `grouped(layer, kv)` exactly. `form` gives a weight to each head, each `column` (channel of a head) or each
    `row` (input feature) of its projections; keys and values have their own. (Chinnakonduru and Mohapatra, Weighted
    Grouped Query Attention in Transformers, 2024.)
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    small = _with_heads(layer, kv)
    for name in PROJECTIONS:
        net = getattr(small, name)
        heads = layer.sizes.heads
        pool = HeadPool(heads, kv, net.out_features // heads, net.in_features, form).to(net.weight)
        for what in [what for what, _ in net.named_parameters()]:
            parametrize.register_parametrization(net, what, pool, unsafe=True)
        net.out_features = net.weight.shape[0]
    return small


def fold(layer: Attention) -> Attention:
    """A copy of a layer made by `weighted` with its learned sums carried out: a plain layer of fewer heads."""
    plain = copy.deepcopy(layer)
    for name in PROJECTIONS:
        net = getattr(plain, name)
        if not parametrize.is_parametrized(net):
            raise ValueError(
                f"{name} of {layer.mechanism} has no weights to fold; make the layer by weighted(...)"
            )
        folded = nn.Linear(net.in_features, net.out_features, bias=net.bias is not None).to(net.weight)
        folded.load_state_dict({n: getattr(net, n).detach() for n in folded.state_dict()})
        setattr(plain, name, folded)
    return plain


def _with_heads(layer: Attention, kv: int) -> Attention:
    """A copy that says it has `kv` key-value heads, its projections still as they were."""
    m, s = layer.mechanism, layer.sizes
    if (
        not isinstance(m, Pairwise | Recurrent)
        or m.heads is not None
        or None in (layer.key_proj, layer.value_proj)
    ):
        raise NotSupported(f"{m} has no multi-head keys and values to pool; convert a layer with plain heads")
    fewer = Sizes(s.heads, shared_heads("kv_heads", kv, s.heads), s.head_dim, s.value_dim)
    if m.weights(fewer) != m.weights(s):
        raise NotSupported(f"{m} learns something for every key-value head, which has no mean that fits")
    small = copy.deepcopy(layer)
    small.mechanism, small.sizes = replace(m, heads=GroupedQuery(kv)), fewer
    return small
