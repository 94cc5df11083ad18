"""What one attention layer remembers: keys on a budget, and the tokens since."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.cache.bases import Bases
from saccade.cache.moments import Moments, Rotation
from saccade.cache.packed import PackedSegments
from saccade.cache.policy import Format, Full, Phases, Policy, Rule, Sight, Stored, choices
from saccade.cache.segments import Partial, Segments, joined
from saccade.errors import MechanismError
from saccade.plan import attend

SLAB = 128

Padded = tuple[Tensor, Tensor, Tensor, Tensor]


class LayerCache:
    """Keys and values of one layer: those that the policy kept, and all tokens since, the same for every head.

    Of the kept ones a format packs the older, `packed`; `kept` are plain.

    `append` adds tokens, `attend` reads with their queries, `compress` lets the policy choose again. After a text of more
    than one token the caller compresses; in decoding `due` says when `every` tokens have come.
    """

    def __init__(
        self,
        policy: Rule | Format,
        layer: int = 0,
        layers: int = 1,
        every: int = 64,
        rotation: Rotation | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is the tokens between two choices in decoding, at least 1, got {every}")
        rule = Stored(Full(), policy) if isinstance(policy, Format) else policy
        self.policy = rule.choice if isinstance(rule, Stored) else rule
        self.format = rule.format if isinstance(rule, Stored) else None
        self.layer, self.layers, self.every = layer, layers, every
        self.forgetting = _forgetting(self.policy)
        skips = [p.sink for p in choices(self.policy) if p.moments]
        self.moments = Moments(max(skips), rotation) if skips else None
        self.length = 0
        self.packed: PackedSegments | None = None
        self.bases: Bases | None = None
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
        stores = [x.nbytes for x in (self.packed, self.kept, self.moments) if x is not None]
        return sum(x.numel() * x.element_size() for x in held) + sum(stores)

    @property
    def recent(self) -> int:
        """Tokens since the policy last chose."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def counts(self) -> tuple[int, ...]:
        """Keys of each row, samples one after the other, head by head."""
        if self.kept is None:
            return () if self.keys is None else (self.recent,) * (self.keys.shape[0] * self.keys.shape[1])
        packed = (0,) * len(self.kept.counts) if self.packed is None else self.packed.counts
        return tuple(m + n + self.recent for m, n in zip(packed, self.kept.counts, strict=True))

    @property
    def batch(self) -> int:
        """Samples."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def wants_mass(self) -> bool:
        """True where the policy asks for the weight that keys have received."""
        return any(p.mass for p in choices(self.policy))

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
        far = [None if x is None else x.read(q) for x in (self.packed, self.kept)]
        return joined([*far, self._near(q)])

    def _near(self, q: Tensor) -> Partial:
        """What the queries find in the tokens since."""
        assert self.keys is not None
        assert self.values is not None
        near = attend(q, self.keys, self.values, "causal", need=("out", "lse"))
        assert near.lse is not None
        return near.out, near.lse

    def _held(self, *, packed: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All keys and values (b, g, n, .), their positions and which places hold one (b, g, n): kept ones first.

        With `packed` False those that are packed are left out.
        """
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
        old = self.kept.padded()
        if packed and self.packed is not None:
            old = _ordered(self.packed.padded(), old)
        rows = [x.unflatten(0, (b, g)) for x in old]
        new = (self.keys, self.values, positions, there)
        k, v, p, t = (torch.cat(x, 2) for x in zip(rows, new, strict=True))
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
        whole = isinstance(policy, Full) and self.mass is None  # what is packed stays as it is
        k, v, positions, there = self._held(packed=not whole)
        sight = Sight(
            k, v, positions, there, q, self.length, self.layer, self.layers, self.mass, self.moments
        )
        keep = policy.chosen(sight)
        if self.format is None:
            self.kept = Segments.kept(k, v, positions, keep)
        else:
            if self.bases is None:
                self.bases = self.format.bases(sight)
            stay = self.packed
            if stay is not None and not whole:
                stay, still = self._thinned(stay, keep)
                keep_plain = keep & ~still
            else:
                keep_plain = keep
            more, self.kept = self.format.store(k, v, positions, keep_plain, self.bases)
            self.packed = more if stay is None else stay.joined(more)
        if self.mass is not None:
            self.mass = _left(self.mass, keep, int(keep.sum(-1).amax()))
        b, g, _, d = self.keys.shape
        self.keys, self.values = k.new_empty(b, g, 0, d), v.new_empty(b, g, 0, v.shape[-1])
        self.there = None

    def _thinned(self, packed: PackedSegments, keep: Tensor) -> tuple[PackedSegments, Tensor]:
        """What stays packed of all that is held where `keep` (b, g, n), and which keys of it those are (b, g, n)."""
        assert self.kept is not None
        (p, there), (_, _, q, also) = packed.spots(), self.kept.padded()
        order = _order(torch.cat((p, q), 1), torch.cat((there, also), 1))
        flat, old = keep.flatten(0, 1), order.shape[1]
        places = torch.zeros(len(p), p.shape[1] + q.shape[1], dtype=torch.bool, device=p.device)
        stay, held = packed.thinned(places.scatter(1, order, flat[:, :old])[:, : p.shape[1]])
        places[:, : p.shape[1]] = held
        still = torch.zeros_like(flat)
        still[:, :old] = places.gather(1, order)
        return stay, still.view_as(keep)

    def select(self, samples: Sequence[int]) -> None:
        """Keep these samples of the batch, in this order: a beam goes on from the best of its rows."""
        rows = list(samples)
        if self.keys is None or self.values is None:
            return
        g = self.keys.shape[1]
        if self.kept is not None:
            heads = [r * g + head for r in rows for head in range(g)]
            self.kept = self.kept.select(heads)
            self.packed = None if self.packed is None else self.packed.select(heads)
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]
        self.there = None if self.there is None else self.there[index]
        self.mass = None if self.mass is None else self.mass[index]
        if self.moments is not None:
            self.moments.select(rows)


def _forgetting(policy: Policy | Phases) -> float:
    """What a token more leaves of the weight that keys have received."""
    found = {p.forgetting for p in choices(policy) if p.mass}
    if len(found) > 1:
        raise MechanismError(
            f"{policy}: the weight that keys receive is added up once, so both forget alike, got {sorted(found)}"
        )
    return found.pop() if found else 1.0


def _ordered(a: Padded, b: Padded) -> Padded:
    """Keys, values, positions and places (R, n, ...) of both, each row in the order of the text, the longest without gaps."""
    k, v, positions, there = (torch.cat(x, 1) for x in zip(a, b, strict=True))
    order = _order(positions, there)
    k, v = (x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v))
    return k, v, positions.gather(1, order), there.gather(1, order)


def _order(positions: Tensor, there: Tensor) -> Tensor:
    """The places (R, n) of the keys of each row in the order of the text; shorter rows go on with places of no key."""
    order = positions.masked_fill(~there, torch.iinfo(torch.long).max).argsort(1)
    return order[:, : int(there.sum(1).amax())]


def _left(x: Tensor, keep: Tensor, width: int) -> Tensor:
    """x (b, g, n) where `keep` is True, each row pushed to the left, (b, g, width)."""
    order = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    return x.gather(-1, order)
