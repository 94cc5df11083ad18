"""Attention that returns how tokens relate, beside attention that returns what they hold."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import Attention
from saccade.parts.base import Sizes
from saccade.parts.heads import INPUT
from saccade.parts.relative import RelValue
from saccade.parts.state import State
from saccade.plan import attend, init_state

SYMBOLS = ("dictionary", "position", "relative")


class Symbols(nn.Module):
    """A vector a token that names it without telling what it holds: by its position, or read from a learned dictionary.

    Those of an offset j - i, cut at half of the entries, belong to pairs: tokens then have zeros, and `params` the vectors.
    """

    def __init__(self, dim: int, width: int, kind: str, entries: int) -> None:
        super().__init__()
        if kind not in SYMBOLS:
            raise ValueError(f"symbols must be one of {', '.join(SYMBOLS)}, got {kind!r}")
        if kind == "relative" and (entries < 3 or entries % 2 == 0):
            raise ValueError(f"relative symbols have an odd number of entries of at least 3, got {entries}")
        self.kind = kind
        self.vectors = nn.Parameter(torch.randn(entries, width) / width**0.5)
        self.key = nn.Linear(dim, entries, bias=False) if kind == "dictionary" else None

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Tokens x (B, n, dim) at positions start, start + 1, ... to symbols (B, n, width)."""
        if self.key is not None:
            return torch.softmax(self.key(x), -1) @ self.vectors
        if self.kind == "relative":
            return x.new_zeros(*x.shape[:2], self.vectors.shape[1])
        end = start + x.shape[1]
        if end > len(self.vectors):
            raise ValueError(
                f"{end} tokens are more than the {len(self.vectors)} positions that have a symbol"
            )
        return self.vectors[start:end].expand(x.shape[0], -1, -1)

    def params(self, columns: int) -> dict[str, Tensor]:
        """The vectors of offsets as a term of the mix, behind so many other columns."""
        return {"rel_value": F.pad(self.vectors, (columns, 0))} if self.kind == "relative" else {}


class RelationalAttention(nn.Module):
    """out_i = sum_j a_ij (W_r r_ij + W_s s_j), with relations r_ij = (Q_l x_i . K_l x_j), l = 1..relations, and symbols s_j.

    The weights a come from any mechanism that learns nothing of its own. As sum_j a_ij Q_l x_i . K_l x_j is
    Q_l x_i . (sum_j a_ij K_l x_j), the K_l x_j and the symbols are columns of one wide value, and no pair is ever stored. With
    `symmetric`, K = Q. Symbols come from a learned `dictionary`, stand for a `position`, or for an offset j - i (`relative`), then
    as s_(j-i) in place of s_j. (Altabaa and Lafferty, Disentangling and Integrating Relational and Sensory Information in
    Transformer Architectures, 2024.)

    >>> RelationalAttention(32, heads=2, mechanism="causal")(torch.zeros(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "full",
        *,
        head_dim: int | None = None,
        relations: int = 4,
        relation_dim: int = 8,
        symmetric: bool = False,
        symbols: str = "dictionary",
        symbol_dim: int = 16,
        entries: int = 32,
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1:
            raise ValueError(f"dim and heads must be at least 1, got dim={dim} and heads={heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}; give head_dim")
        size = head_dim or dim // heads
        self.mechanism = parse(mechanism)
        self.relations, self.relation_dim = relations, relation_dim
        self.sizes = Sizes(heads, heads, size, relations * relation_dim + symbol_dim)
        m = self.mechanism
        plain = m.kv_heads(heads) == heads and {m.source(on) for on in ("q", "k", "v")} == {INPUT}
        if not plain or m.weights(self.sizes) or m.streams(self.sizes) or m.buffer_names():
            raise NotSupported(
                f"relational heads take a mechanism that owns nothing, such as causal + rope, got {m}"
            )
        self.query_proj, self.key_proj = (nn.Linear(dim, heads * size, bias=False) for _ in range(2))
        self.relation_query = nn.Linear(dim, relations * relation_dim, bias=False)
        self.relation_key = None if symmetric else nn.Linear(dim, relations * relation_dim, bias=False)
        self.symbols = Symbols(dim, symbol_dim, symbols, entries)
        if symbols == "relative":
            if not isinstance(m, Pairwise):
                raise NotSupported(
                    f"relative symbols belong to pairs, which a {m.family} mechanism has none of"
                )
            self.mechanism = replace(m, value=(RelValue(entries // 2),))
        self.read = nn.Parameter(
            torch.randn(heads, relations + symbol_dim, size) / (relations + symbol_dim) ** 0.5
        )
        self.out_proj = nn.Linear(heads * size, dim, bias=False)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.sizes.heads
        q, k = (net(x).unflatten(-1, (heads, -1)).transpose(1, 2) for net in (self.query_proj, self.key_proj))
        related = (self.relation_query if self.relation_key is None else self.relation_key)(x)
        wide = torch.cat((related / self.relation_dim**0.5, self.symbols(x, start)), -1)
        return q, k, wide[:, None].expand(-1, heads, -1, -1)

    def _merge(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Mixed columns (B, H, n, wide): the relations against the query's own side, then the maps of each head."""
        asked = self.relation_query(x).unflatten(-1, (self.relations, -1))
        columns = self.relations * self.relation_dim
        keys = mixed[..., :columns].unflatten(-1, (self.relations, -1))
        told = torch.cat((torch.einsum("bhnrd,bnrd->bhnr", keys, asked), mixed[..., columns:]), -1)
        return self.out_proj(torch.einsum("bhnc,hce->bnhe", told, self.read).flatten(2))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
        """Tokens x (B, L, dim) to (B, L, dim); later tokens than `key_lengths` (B,) are padding."""
        params = self.symbols.params(self.relations * self.relation_dim)
        mixed = attend(
            *self._project(x, 0), self.mechanism, mask=mask, key_lengths=key_lengths, params=params
        )
        return self._merge(mixed, x)

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        s, like = self.sizes, self.out_proj.weight
        return init_state(
            self.mechanism, batch, s.heads, s.head_dim, s.value_dim, dtype=like.dtype, device=like.device
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim) and the state before them to their features and the state after."""
        q, k, v = self._project(x, state.length)
        params = self.symbols.params(self.relations * self.relation_dim)
        found = attend(q, k, v, self.mechanism, state=state, need=("out", "state"), params=params)
        assert found.state is not None
        return self._merge(found.out, x), found.state


class DualAttention(nn.Module):
    """Sensory heads, plain attention, beside `relational` heads; their outputs share one output projection.

    `options` are those of `RelationalAttention`. (Altabaa and Lafferty, Disentangling and Integrating Relational and Sensory
    Information in Transformer Architectures, 2024.)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        relational: int,
        mechanism: str | Mechanism = "full",
        **options: int | bool | str,
    ) -> None:
        super().__init__()
        if heads < 1 or not 0 <= relational <= heads or dim % heads:
            raise ValueError(
                f"relational heads are 0 to {heads} of at least one that divide dim, got {relational} of heads={heads} "
                f"with dim={dim}"
            )
        size, sensory = dim // heads, heads - relational
        self.sensory = Attention(dim, sensory, mechanism, head_dim=size) if sensory else None
        self.relational = (
            RelationalAttention(dim, relational, mechanism, head_dim=size, **options)  # type: ignore[arg-type]
            if relational
            else None
        )

    def forward(self, x: Tensor, *, mask: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
        """Tokens x (B, L, dim) to (B, L, dim): the sum over all heads of their own output projections."""
        kinds = [part for part in (self.sensory, self.relational) if part is not None]
        found = [part(x, mask=mask, key_lengths=key_lengths) for part in kinds]
        return found[0] if len(found) == 1 else found[0] + found[1]
