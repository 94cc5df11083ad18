"""Cross-attention to several sources at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism
from saccade.nn.attention import Attention

MODES = ("serial", "parallel", "flat", "hierarchical")


class MultiSourceAttention(nn.Module):
    """x plus what it reads in several contexts; x (B, L, dim), each context (B, S_n, dim), the answer (B, L, dim).

    `serial`: one after another, each from the sum so far. `parallel`: the sum of all. `flat`: one attention over the joined
    contexts. `hierarchical`: one attention each, then one of x over their results. Queries are normalised first. (Libovicky,
    Helcl and Marecek, Input Combination Strategies for Multi-Source Transformer Decoder, 2018.)

    >>> layer = MultiSourceAttention(32, heads=4, sources=2, mode="hierarchical")
    >>> layer(torch.zeros(1, 5, 32), [torch.zeros(1, 7, 32), torch.zeros(1, 3, 32)]).shape
    torch.Size([1, 5, 32])
    """

    def __init__(
        self, dim: int, heads: int, sources: int, mode: str, mechanism: str | Mechanism = "full"
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if sources < 1:
            raise ValueError(f"there must be at least one source, got sources={sources}")
        self.sources, self.mode = sources, mode
        readers, norms = (1 if mode == "flat" else sources), (sources if mode == "serial" else 1)
        self.readers = nn.ModuleList(Attention(dim, heads, mechanism) for _ in range(readers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(norms))
        self.upper = Attention(dim, heads) if mode == "hierarchical" else None

    def forward(
        self,
        x: Tensor,
        contexts: Sequence[Tensor],
        *,
        key_lengths: Sequence[Tensor | None] | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """The sums. Later tokens than a source's `key_lengths` (B,) are padding; a source that is not `present`, (B, sources),
        counts as if it had never been there."""
        lengths = key_lengths if key_lengths is not None else [None] * len(contexts)
        if not len(contexts) == len(lengths) == self.sources:
            raise ValueError(
                f"{self.sources} sources need as many contexts and key_lengths, got {len(contexts)} and {len(lengths)}"
            )
        there = x.new_ones(len(x), self.sources, dtype=torch.bool) if present is None else present
        if there.shape != (len(x), self.sources) or there.dtype != torch.bool:
            raise ValueError(
                f"present must be boolean ({len(x)}, {self.sources}), got {there.dtype} {tuple(there.shape)}"
            )
        sizes = [
            self._size(c, n, there[:, at]) for at, (c, n) in enumerate(zip(contexts, lengths, strict=True))
        ]
        if self.mode == "serial":
            for norm, reader, context, size in zip(self.norms, self.readers, contexts, sizes, strict=True):
                x = x + reader(norm(x), context, key_lengths=size)
            return x
        q = self.norms[0](x)
        if self.mode == "flat":
            return x + self._flat(q, contexts, sizes)
        found = torch.stack(
            [r(q, c, key_lengths=n) for r, c, n in zip(self.readers, contexts, sizes, strict=True)], 2
        )
        return x + (found.sum(2) if self.upper is None else self._choose(self.upper, q, found, there))

    def _size(self, context: Tensor, lengths: Tensor | None, there: Tensor) -> Tensor:
        """Keys of a source that may be read, (B,): none where it is missing."""
        whole = torch.full((len(context),), context.shape[1], device=context.device)
        return torch.where(there, whole if lengths is None else lengths, 0)

    def _flat(self, q: Tensor, contexts: Sequence[Tensor], sizes: Sequence[Tensor]) -> Tensor:
        """One attention over the joined contexts."""
        masks = [
            torch.arange(c.shape[1], device=q.device) < n[:, None]
            for c, n in zip(contexts, sizes, strict=True)
        ]
        mask = torch.cat(masks, 1)
        joined = torch.cat(list(contexts), 1).masked_fill(~mask.unsqueeze(-1), 0)
        found: Tensor = self.readers[0](q, joined, mask=mask[:, None, None])
        return found

    def _choose(self, upper: Attention, q: Tensor, found: Tensor, there: Tensor) -> Tensor:
        """Attention of each row of q over the results of the sources, (B, L, sources, dim)."""
        mask = there.repeat_interleave(q.shape[1], 0)[:, None, None]
        out: Tensor = upper(q.flatten(0, 1)[:, None], found.flatten(0, 1), mask=mask)
        return out.view_as(q)
