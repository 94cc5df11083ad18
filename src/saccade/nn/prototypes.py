"""Attention that also reads prototypes of what recent batches held: cluster centres of their keys, with values."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism
from saccade.nn.attention import Attention
from saccade.parts.normalizer import merge
from saccade.parts.state import State
from saccade.plan import attend


@torch.no_grad()
def prototypes(
    keys: Tensor, values: Tensor, count: int, *, neighbours: int = 8, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`count` prototype keys (G, m, D) and values (G, m, E) of keys (G, N, D) and values (G, N, E), for each of G heads.

    Keys are the centres of k-means; a value is the mean of those of the `neighbours` nearest keys, weighted by
    exp(-distance). (Barraco et al., With a Little Help from your own Past: Prototypical Memory Networks for Image
    Captioning, 2023.)
    """
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"prototypes: keys are (G, N, D) and values (G, N, E), got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not 1 <= count <= keys.shape[1] or neighbours < 1:
        raise ValueError(
            f"prototypes: {keys.shape[1]} keys have 1 to {keys.shape[1]} prototypes with at least one neighbour, got "
            f"{count} prototypes and {neighbours} neighbours"
        )
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError(
            "prototypes: keys and values must be finite; leave padding out, as remember(key_lengths=...) does"
        )
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    centres = kmeans(wide, count, generator)
    distance, index = torch.cdist(centres, wide).topk(min(neighbours, keys.shape[1]), largest=False)
    shares = torch.softmax(-distance, -1).unsqueeze(-1)
    heads = torch.arange(len(keys), device=keys.device)[:, None, None]
    return centres.to(keys.dtype), (shares * values[heads, index]).sum(2).to(values.dtype)


def kmeans(x: Tensor, count: int, generator: torch.Generator | None = None, steps: int = 100) -> Tensor:
    """`count` centres (G, m, D) of points (G, N, D), by Lloyd's steps from a greedy k-means++ start, until none moves.

    (Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.)
    """
    centres, nearest = _seeds(x, count, generator), None
    for _ in range(steps):
        before, nearest = nearest, torch.cdist(x, centres).argmin(-1)
        if before is not None and torch.equal(nearest, before):
            break
        own = nearest.unsqueeze(-1)
        sums = torch.zeros_like(centres).scatter_add(1, own.expand_as(x), x)
        sizes = torch.zeros_like(centres[..., :1]).scatter_add(1, own, torch.ones_like(x[..., :1]))
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres


def _seeds(x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Points (G, count, D) far from each other: each the best of a few drawn by their squared distance from those before."""
    heads, tries = torch.arange(len(x), device=x.device), 2 + int(math.log(count))
    gap, seeds = torch.full_like(x[..., 0], math.inf), []
    for n in range(count):
        odds = torch.ones_like(gap) if not n else gap
        odds = torch.where(odds.sum(-1, keepdim=True) > 0, odds, 1)
        draw = torch.multinomial(odds.cpu(), 1 if not n else tries, replacement=True, generator=generator)
        candidates = x[heads[:, None], draw.to(x.device)]
        gaps = torch.minimum(gap.unsqueeze(1), torch.cdist(candidates, x).square())
        best = gaps.sum(-1).argmin(-1)
        gap = gaps[heads, best]
        seeds.append(candidates[heads, best])
    return torch.stack(seeds, 1)


class PrototypeAttention(nn.Module):
    """One softmax over the keys of a mechanism and over `count` prototypes of what the last batches held, without positions.

    In training call `remember(x)` after a step, which banks its keys and values and drops those of more than `batches` calls
    ago, and now and then `refresh()`, which clusters the bank. Prototypes are buffers, so no gradient reaches them; a learned
    vector for keys and one for values is added to all. Until the first `refresh`, and with count=0, it is attention by the
    mechanism alone. x is (B, n, dim), the answer (B, n, dim). The bank is not saved. (Barraco et al., With a Little Help from
    your own Past: Prototypical Memory Networks for Image Captioning, 2023.)

    >>> layer = PrototypeAttention(32, heads=4, count=5)
    >>> layer.remember(torch.randn(2, 10, 32))
    >>> layer.refresh()
    >>> layer(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    prototype_keys: Tensor
    prototype_values: Tensor
    ready: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "full",
        *,
        count: int = 64,
        batches: int = 16,
        neighbours: int = 8,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        if count < 0 or batches < 1 or neighbours < 1:
            raise ValueError(
                f"count must be at least 0, batches and neighbours at least 1, got {count}, {batches} and {neighbours}"
            )
        self.attention = Attention(dim, heads, mechanism, context_dim=context_dim)
        m, s = self.attention.mechanism, self.attention.sizes
        if m.weights(s) or m.streams(s) or m.buffer_names():
            raise NotSupported(
                f"{m} has weights, streams or buffers of its own, which prototypes have no part in; take one without, "
                "such as full, causal + rope or gqa(2)"
            )
        self.count, self.neighbours = count, neighbours
        self.bank: deque[tuple[Tensor, Tensor]] = deque(maxlen=batches)
        self.register_buffer("prototype_keys", torch.zeros(s.kv_heads, count, s.head_dim))
        self.register_buffer("prototype_values", torch.zeros(s.kv_heads, count, s.value_dim))
        self.register_buffer("ready", torch.tensor(False))
        if count:
            self.mark_key = nn.Parameter(0.02 * torch.randn(s.kv_heads, 1, s.head_dim))
            self.mark_value = nn.Parameter(0.02 * torch.randn(s.kv_heads, 1, s.value_dim))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, key_lengths: Tensor | None = None
    ) -> Tensor:
        """The mixed features; later keys than `key_lengths` (B,) are padding, and so are their queries without a context."""
        later = None
        if key_lengths is not None and context is None:
            later = (torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]).unsqueeze(-1)
            x = x.masked_fill(later, 0)
        q, k, v = self.attention.project(x, context)
        if not self.count:
            out = attend(q, k, v, self.attention.mechanism, key_lengths=key_lengths)
        else:
            own = attend(q, k, v, self.attention.mechanism, key_lengths=key_lengths, need=("out", "lse"))
            out = self._joined(q, own.out, own.lse)
        mixed = self.attention.out_proj(out.transpose(1, 2).flatten(2))
        return mixed if later is None else mixed.masked_fill(later, 0)

    def _joined(self, q: Tensor, out: Tensor, lse: Tensor | None) -> Tensor:
        """What queries find in their own keys and in the prototypes, (B, H, L, E)."""
        assert lse is not None
        k, v = self.prototype_keys + self.mark_key, self.prototype_values + self.mark_value
        k, v = (y.to(q.dtype).expand(len(q), -1, -1, -1) for y in (k, v))
        known = attend(q, k, v, "full", need=("out", "lse"))
        assert known.lse is not None
        return merge([(out, lse), (known.out, known.lse.masked_fill(~self.ready, -math.inf))])[0]

    @torch.no_grad()
    def remember(
        self, x: Tensor, context: Tensor | None = None, *, key_lengths: Tensor | None = None
    ) -> None:
        """Bank the keys and values of an input (B, n, dim), or of its context, without padding."""
        k, v = self.attention.keys_values(x, context)
        k, v = (y.transpose(0, 1).flatten(1, 2) for y in (k, v))
        if key_lengths is not None:
            n = (x if context is None else context).shape[1]
            real = (torch.arange(n, device=x.device) < key_lengths[:, None]).flatten()
            k, v = k[:, real], v[:, real]
        self.bank.append((k, v))

    @torch.no_grad()
    def refresh(self, generator: torch.Generator | None = None) -> None:
        """Cluster the bank anew. Raises ValueError where it holds fewer keys than there are prototypes."""
        if not self.count:
            return
        held = sum(k.shape[1] for k, _ in self.bank)
        if held < self.count:
            raise ValueError(
                f"the bank holds {held} keys, fewer than the {self.count} prototypes; call remember(x) on more batches first"
            )
        keys, values = (torch.cat(parts, 1) for parts in zip(*self.bank, strict=True))
        k, v = prototypes(keys, values, self.count, neighbours=self.neighbours, generator=generator)
        self.prototype_keys.copy_(k)
        self.prototype_values.copy_(v)
        self.ready.fill_(True)

    def init_state(self, batch: int) -> State:
        """The state before the first token. Raises NotSupported for a mechanism that cannot decode step by step."""
        return self.attention.init_state(batch)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        q, k, v = self.attention.project(x)
        need = ("out", "lse", "state") if self.count else ("out", "state")
        found = attend(q, k, v, self.attention.mechanism, state=state, need=need)
        assert found.state is not None
        out = self._joined(q, found.out, found.lse) if self.count else found.out
        return self.attention.out_proj(out.transpose(1, 2).flatten(2)), found.state
