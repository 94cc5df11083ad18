"""Where q, k and v come from and how query heads share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.errors import MechanismError
from saccade.parts.base import Part, Sizes, Weight, arg
from saccade.parts.tokens import On

INPUT, SLICE, LEARNED, NONE = "input", "slice", "learned", "none"


class Heads(Part):
    """How a layer makes the heads: what q, k and v are projected from, and how many heads share a projection."""

    kind = "heads"
    learned_query: ClassVar[bool] = False

    def kv_heads(self, heads: int) -> int:
        """Key-value heads of a layer with `heads` query heads."""
        return heads

    def query_heads(self, heads: int) -> int:
        """Query heads that are projected, each then used by as many heads as divide."""
        return heads

    def source(self, on: On) -> str:
        """What q, k or v is made from: `input`, `slice`, `learned`, or the name of a tensor that the call brings.

        `input` is the layer's input, or for k and v its context; `slice` the same without a projection, so that head h
        takes its own share of the features; `learned` the weight `query`, (H, D) or (H, rows, D). Where the source is
        `none`, nothing reads the tensor: the layer makes none and passes the values.
        """
        return INPUT


def shared_heads(name: str, kv: int, heads: int) -> int:
    """`kv`, or MechanismError where it does not divide `heads`."""
    if heads % kv:
        divisors = [g for g in range(1, heads + 1) if heads % g == 0]
        raise MechanismError(
            f"{name}: {kv} key-value heads do not divide {heads} query heads; use one of {divisors}"
        )
    return kv


@dataclass(frozen=True)
class GroupedQuery(Heads):
    """Query head h reads key-value head floor(h kv / heads) (Ainslie et al., GQA, 2023)."""

    kv: int = arg(at_least=1)

    name = "kv_heads"

    def kv_heads(self, heads: int) -> int:
        return shared_heads("kv_heads", self.kv, heads)


@dataclass(frozen=True)
class Sources(Heads):
    """q, k and v from named sources: `input`, `slice`, or a tensor that the layer's call brings by that name.

    Positions, layout or another modality may decide who reads whom while the values come from the input. `kv` shares
    key-value heads as `kv_heads` does. A functional call takes q, k and v as they are.
    """

    q: str = INPUT
    k: str = INPUT
    v: str = INPUT
    kv: int | None = arg(None, at_least=1)

    name = "sources"

    def __post_init__(self) -> None:
        super().__post_init__()
        for on, name in (("q", self.q), ("k", self.k), ("v", self.v)):
            if name == LEARNED:
                raise MechanismError(f"sources: {on} cannot be learned; learned_queries(rows) learns queries")
            if not name.isidentifier() or name in ("true", "false", "none"):
                raise MechanismError(f"sources: {on} must be a word such as input or layout, got {name!r}")

    def kv_heads(self, heads: int) -> int:
        return heads if self.kv is None else shared_heads("sources", self.kv, heads)

    def source(self, on: On) -> str:
        return {"q": self.q, "k": self.k, "v": self.v}[on]


@dataclass(frozen=True)
class LearnedQueries(Heads):
    """`rows` learned queries a head stand in for the tokens' own; one output a query (Lee et al., Set Transformer, 2019).

    A functional call takes them as q, (B, H, rows, D); a layer answers (B, rows, dim).
    """

    rows: int = arg(1, at_least=1)

    name = "learned_queries"
    causal = "never"
    relative = "learned_query"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"query": Weight((sizes.heads, self.rows, sizes.head_dim), std=1.0)}

    def source(self, on: On) -> str:
        return LEARNED if on == "q" else INPUT


@dataclass(frozen=True)
class LearnedQuery(Heads):
    """One learned query a head; every key position reads its own prefix (Feng et al., Attention as an RNN, 2024).

    The call takes q with one row, (B, H, 1, D), and answers one row a key.
    """

    name = "learned_query"
    learned_query = True
    needs = frozenset({"key order", "one query for all rows"})
    gives = frozenset({"one query for all rows"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"query": Weight((sizes.heads, sizes.head_dim), std=1.0)}

    def source(self, on: On) -> str:
        return LEARNED if on == "q" else INPUT
