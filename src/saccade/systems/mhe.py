"""Heads that differ by small learned vectors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Part, Sizes, Weight, arg
from saccade.parts.heads import Heads
from saccade.parts.output import Output
from saccade.parts.tokens import On, TokenMap
from saccade.parts.value import Value

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile

MODES = ("mul", "add")


@dataclass(frozen=True)
class SharedHeads(Heads):
    """One projection of queries, one of keys and one of values for all heads."""

    name = "shared_heads"

    def kv_heads(self, heads: int) -> int:
        return 1

    def query_heads(self, heads: int) -> int:
        return 1


@dataclass(frozen=True)
class EmbedHeads(TokenMap):
    """Query and key of a head from the shared ones: times 1 + e, or plus e, with learned vectors e a head.

    The keys stay shared: (q (1 + e_q)).(k (1 + e_k)) = (q (1 + e_q) (1 + e_k)).k, and (q + e_q).(k + e_k) differs from
    (q + e_q).k by a constant of the row, which the softmax drops, so that `add` learns nothing from its e_k.
    """

    mode: str = arg("mul", choices=MODES)

    name = "embed_heads"
    on = ("q",)
    needs = frozenset({"bilinear", "exp"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        each = Weight((sizes.heads, sizes.head_dim), std=0.5)
        return {"embed_q": each, "embed_k": each}

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        e_q, e_k = (c.params[n][:, None].to(x.dtype) for n in ("embed_q", "embed_k"))
        return x + e_q if self.mode == "add" else x * (1 + e_q) * (1 + e_k)


def value_vectors(sizes: Sizes) -> dict[str, Weight]:
    """One learned vector a head on the value side."""
    return {"embed_v": Weight((sizes.heads, sizes.value_dim), std=0.5)}


@dataclass(frozen=True)
class EmbedScale(Output):
    """sum_j w_j (v_j (1 + e)) = (sum_j w_j v_j) (1 + e): values of a head, scaled behind the mix."""

    name = "embed_scale"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return value_vectors(sizes)

    def map(self, out: Tensor, c: Context) -> Tensor:
        return out * (1 + c.params["embed_v"][:, None].to(out.dtype))


@dataclass(frozen=True)
class EmbedShift(Value):
    """sum_j w_j (v_j + e) = sum_j w_j v_j + e sum_j w_j: values of a head, shifted behind the mix."""

    name = "embed_shift"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return value_vectors(sizes)

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        return w.sum(-1, keepdim=True) * t.params["embed_v"][:, None].to(w.dtype)


@system("mhe", ref="S126")
def mhe(mode: str = "mul") -> Pairwise:
    """All heads from one projection of q, k and v, told apart by three learned vectors a head.

    `mul` scales by 1 + e, `add` adds e. It runs as multi-query attention: the cache holds one head. (Xue and Aletras,
    Pit One Against Many, 2023.)
    """
    if mode not in MODES:
        raise MechanismError(f"mhe: mode must be one of {', '.join(MODES)}, got {mode!r}")
    behind: dict[str, tuple[Part, ...]] = (
        {"output": (EmbedScale(),)} if mode == "mul" else {"value": (EmbedShift(),)}
    )
    return Pairwise(heads=SharedHeads(), tokens=(EmbedHeads(mode),), **behind)  # type: ignore[arg-type]
