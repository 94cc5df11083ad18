"""Where the query comes from and how query heads share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.errors import MechanismError
from saccade.parts.base import Part, Sizes, Weight, arg


class Heads(Part):
    """How heads are laid out: the number of key-value heads, and whether the query is a learned constant."""

    kind = "heads"
    learned_query: ClassVar[bool] = False

    def kv_heads(self, heads: int) -> int:
        """Key-value heads of a layer with `heads` query heads."""
        return heads


@dataclass(frozen=True)
class GroupedQuery(Heads):
    """Query head h reads key-value head floor(h kv / heads) (Ainslie et al., GQA, 2023)."""

    kv: int = arg(at_least=1)

    name = "kv_heads"

    def kv_heads(self, heads: int) -> int:
        if heads % self.kv:
            divisors = [g for g in range(1, heads + 1) if heads % g == 0]
            raise MechanismError(
                f"kv_heads: {self.kv} key-value heads do not divide {heads} query heads; use one of {divisors}"
            )
        return self.kv


@dataclass(frozen=True)
class LearnedQuery(Heads):
    """One learned query a head; every key position reads its own prefix (Feng et al., Attention as an RNN, 2024).

    The call takes q with one row, (B, H, 1, D), and answers one row a key.
    """

    name = "learned_query"
    learned_query = True
    needs = frozenset({"key order"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"query": Weight((sizes.heads, sizes.head_dim), std=1.0)}
