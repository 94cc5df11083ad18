"""What one attention layer remembers: keys on a budget, and the tokens since."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.cache.moments import Moments, Rotation
from saccade.cache.policy import Phases, Policy, Sight
from saccade.cache.segments import Partial, Segments, joined
from saccade.errors import MechanismError
from saccade.plan import attend

SLAB = 128


class LayerCache:
    """Keys and values of one layer: those that the policy kept, and all tokens since, the same for every head.

    `append` adds tokens, `attend` reads with their queries, `compress` lets the policy choose again. After a text of more
    than one token the caller compresses; in decoding `due` says when `every` tokens have come.
    """

    def __init__(
        self,
        policy: Policy | Phases,
        layer: int = 0,
        layers: int = 1,
        every: int = 64,
        rotation: Rotation | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is the tokens between two choices in decoding, at least 1, got {every}")
        self.policy, self.layer, self.layers, self.every = policy, layer, layers, every
        self.forgetting = _forgetting(policy)
        skips = [p.sink for p in _parts(policy) if p.moments]
        self.moments = Moments(max(skips), rotation) if skips else None
        self.length = 0
        self.kept: Segments | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.there: Tensor | None = None  # (b, n) of the tokens since, where some are padding
        self.mass: Tensor | None = (
            None  # (b, g, n) of all that is held, kept keys first, padded to the longest row
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        held = [x for x in (self.keys, self.values, self.there, self.mass) if x is not None]
        more = [x for x in (self.kept, self.moments) if x is not None]
        return sum(x.numel() * x.element_size() for x in held) + sum(x.nbytes for x in more)

    @property
    def recent(self) -> int:
        """Tokens since the policy last chose."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def counts(self) -> tuple[int, ...]:
        """Keys of each row, samples one after the other, head by head."""
        if self.kept is None:
            return () if self.keys is None else (self.recent,) * (self.keys.shape[0] * self.keys.shape[1])
        return tuple(n + self.recent for n in self.kept.counts)

    @property
    def batch(self) -> int:
        """Samples."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def wants_mass(self) -> bool:
        """True where the policy asks for the weight that keys have received."""
        return any(p.mass for p in _parts(self.policy))

    @property
    def due(self) -> bool:
        """True when so many tokens have come that the policy should choose again."""
        return self.kept is None or self.recent >= self.every

    def append(self, k: Tensor, v: Tensor, there: Tensor | None = None) -> None:
        """Tokens k (b, g, n, d) and v (b, g, n, e) after all others; `there` (b, n) is False where one is padding."""
        self.length += k.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values, self.there = k, v, there
            return
        if there is not None or self.there is not None:
            raise ValueError(
                "padding is known of a text that is read at once: compress before more tokens come"
            )
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)

    def attend(self, q: Tensor) -> Tensor:
        """What the queries (b, h, L, d) of the last L tokens find, (b, h, L, e): kept keys, and those since causally."""
        far = None if self.kept is None else self.kept.read(q)
        return joined([far, self._near(q)])

    def _near(self, q: Tensor) -> Partial:
        """What the queries find in the tokens since."""
        assert self.keys is not None
        assert self.values is not None
        near = attend(q, self.keys, self.values, "causal", need=("out", "lse"))
        assert near.lse is not None
        return near.out, near.lse

    def _held(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All keys and values (b, g, n, .), their positions and which places hold one (b, g, n): kept ones first."""
        assert self.keys is not None
        assert self.values is not None
        b, g, n = self.keys.shape[:3]
        positions = torch.arange(self.length - n, self.length, device=self.keys.device).expand(b, g, n)
        there = (
            torch.ones(b, n, dtype=torch.bool, device=self.keys.device) if self.there is None else self.there
        )
        there = there[:, None].expand(b, g, n)
        if self.kept is None:
            return self.keys, self.values, positions, there
        old = [x.unflatten(0, (b, g)) for x in self.kept.padded()]
        new = (self.keys, self.values, positions, there)
        k, v, p, t = (torch.cat(x, 2) for x in zip(old, new, strict=True))
        return k, v, p, t

    @torch.no_grad()
    def observe(self, q: Tensor) -> None:
        """Take down what the policy asks for of the queries (b, h, L, d) of the last L tokens: the weight that every held key
        receives, mean and covariance of the queries."""
        if self.moments is not None:
            self.moments.add(q, self.length - q.shape[2], self.there)
        if self.wants_mass:
            self._weigh(q)

    def _weigh(self, q: Tensor) -> None:
        k, _, positions, there = self._held()
        b, g, n, d = k.shape
        total = torch.zeros(b, g, n, device=k.device)
        if self.mass is not None:
            old = n - self.recent
            split = self.mass.shape[-1] - (self.recent - q.shape[2])
            total[..., : min(old, split)] = self.mass[..., : min(old, split)]
            total[..., old : old + self.recent - q.shape[2]] = self.mass[..., split:]
        total *= self.forgetting ** q.shape[2]
        rows = q.float().view(b, g, -1, *q.shape[2:])
        for start in range(0, q.shape[2], SLAB):
            some = rows[..., start : start + SLAB, :]
            at = self.length - q.shape[2] + start + torch.arange(some.shape[3], device=q.device)
            seen = there[:, :, None] & (positions[:, :, None] <= at[:, None])
            logits = some @ k.float().unsqueeze(2).transpose(-1, -2) / math.sqrt(d)
            weights = torch.softmax(logits.masked_fill(~seen[:, :, None], -torch.inf), -1).nan_to_num(0.0)
            total += torch.einsum("bgln,l->bgn", weights.sum(2), self.forgetting ** (self.length - 1.0 - at))
        self.mass = total

    @torch.no_grad()
    def compress(self, q: Tensor) -> None:
        """Keep what the policy chooses; q (b, h, L, d) are the queries of the latest call."""
        if self.keys is None:
            return
        policy = self.policy
        if isinstance(policy, Phases):
            policy = policy.prefill if q.shape[2] > 1 or self.kept is None else policy.decode
        k, v, positions, there = self._held()
        sight = Sight(
            k, v, positions, there, q, self.length, self.layer, self.layers, self.mass, self.moments
        )
        keep = policy.chosen(sight)
        self.kept = Segments.kept(k, v, positions, keep)
        if self.mass is not None:
            self.mass = _packed(self.mass, keep, max(self.kept.counts, default=0))
        b, g, _, d = self.keys.shape
        self.keys, self.values = k.new_empty(b, g, 0, d), v.new_empty(b, g, 0, v.shape[-1])
        self.there = None

    def select(self, samples: Sequence[int]) -> None:
        """Keep these samples of the batch, in this order: a beam goes on from the best of its rows."""
        rows = list(samples)
        if self.keys is None or self.values is None:
            return
        g = self.keys.shape[1]
        if self.kept is not None:
            self.kept = self.kept.select([r * g + head for r in rows for head in range(g)])
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]
        self.there = None if self.there is None else self.there[index]
        self.mass = None if self.mass is None else self.mass[index]
        if self.moments is not None:
            self.moments.select(rows)


def _parts(policy: Policy | Phases) -> tuple[Policy, ...]:
    return (policy.prefill, policy.decode) if isinstance(policy, Phases) else (policy,)


def _forgetting(policy: Policy | Phases) -> float:
    """What a token more leaves of the weight that keys have received."""
    found = {p.forgetting for p in _parts(policy) if p.mass}
    if len(found) > 1:
        raise MechanismError(
            f"{policy}: the weight that keys receive is added up once, so both forget alike, got {sorted(found)}"
        )
    return found.pop() if found else 1.0


def _packed(x: Tensor, keep: Tensor, width: int) -> Tensor:
    """x (b, g, n) where `keep` is True, each row pushed to the left, (b, g, width)."""
    order = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    return x.gather(-1, order)
