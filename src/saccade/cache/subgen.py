"""A cache that is a sketch: clustered keys estimate the denominator of attention, sampled values the numerator.

Legend: b batch, g key-value heads, R = b g rows, n tokens, M clusters, t samples of a cluster, s sampled values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.layer import LayerCache
from saccade.cache.moments import Rotation
from saccade.cache.policy import Format, Policy, Rule, Sight, Stored
from saccade.cache.segments import Partial, Segments, joined
from saccade.errors import MechanismError, NotSupported


@dataclass(frozen=True)
class SubGen(Policy):
    """All tokens but the `sink` first and `recent` last ones as a sketch, whose size follows the clusters of the keys.

    A key joins the nearest cluster within `delta` or opens one; a cluster holds `samples` of its keys, drawn evenly, and a row
    `keep` keys with values, drawn by the square of the value's norm. (Zandieh et al., SubGen: Token Generation in Sublinear
    Time and Memory, 2024.)
    """

    keep: float | int = 256
    delta: float = 1.0
    samples: int = 4
    seed: int = 0

    name = "subgen"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, float):
            raise MechanismError(
                f"subgen: keep is a number of sampled values, as they are drawn while the text is read, got the share {self.keep}"
            )
        if not self.delta >= 0 or self.samples < 1:
            raise MechanismError(
                f"subgen: delta is a distance of at least 0 and samples at least 1, got {self.delta!r} and {self.samples}"
            )

    def scores(self, sight: Sight) -> Tensor:
        raise NotSupported(
            "subgen keeps a sketch, no choice of keys: make its cache by saccade.cache.layer_cache, with subgen for all phases"
        )


class Sketch:
    """Clusters and sampled values of R rows: `add` tokens one after the other, `read` estimates attention to all of them."""

    def __init__(self, delta: float, samples: int, values: int, generator: torch.Generator) -> None:
        self.delta, self.samples, self.values, self.generator = delta, samples, values, generator
        self.centres = self.drawn = self.members = self.used = torch.zeros(0)
        self.keys = self.found = self.total = torch.zeros(0)

    @property
    def clusters(self) -> tuple[int, ...]:
        """Clusters of each row."""
        return tuple(int(n) for n in self.used)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = (self.centres, self.drawn, self.members, self.used, self.keys, self.found, self.total)
        return sum(x.numel() * x.element_size() for x in held)

    def add(self, k: Tensor, v: Tensor, there: Tensor | None = None) -> None:
        """Tokens k (R, n, d) and v (R, n, e), in order; `there` (R, n) is False where one is padding."""
        rows, n, d = k.shape
        wide = torch.promote_types(k.dtype, torch.float32)
        if not len(self.used):
            self.centres, self.drawn = k.new_zeros(rows, 0, d), k.new_zeros(rows, 0, self.samples, d)
            self.members = torch.zeros(rows, 0, dtype=torch.long, device=k.device)
            self.used = torch.zeros(rows, dtype=torch.long, device=k.device)
            self.keys, self.found = (
                k.new_zeros(rows, self.values, d),
                v.new_zeros(rows, self.values, v.shape[-1]),
            )
            self.total = torch.zeros(rows, dtype=wide, device=k.device)
        if there is None:
            there = torch.ones(rows, n, dtype=torch.bool, device=k.device)
        squares = v.to(wide).square().sum(-1)
        for j in range(n):
            self._join(k[:, j], there[:, j])
            self._sample(k[:, j], v[:, j], squares[:, j], there[:, j])
        longest = max(self.clusters, default=0)
        self.centres, self.drawn = self.centres[:, :longest].clone(), self.drawn[:, :longest].clone()
        self.members = self.members[:, :longest].clone()

    def _chance(self, rows: int, draws: int, x: Tensor) -> Tensor:
        return torch.rand(rows, draws, generator=self.generator, dtype=torch.float64).to(x.device)

    def _join(self, key: Tensor, there: Tensor) -> None:
        """A key of each row (R, d) joins the nearest cluster, or opens one."""
        rows, room = self.members.shape
        places = torch.arange(room, device=key.device)
        far = (self.centres - key[:, None]).to(self.total.dtype).norm(dim=-1)
        far = far.masked_fill(places >= self.used[:, None], torch.inf)
        near = far.argmin(1) if room else self.used
        opens = there & ((far.amin(1) > self.delta) if room else torch.ones_like(there))
        if bool((opens & (self.used >= room)).any()):
            more = max(8, room)
            self.centres = torch.cat((self.centres, key.new_zeros(rows, more, key.shape[-1])), 1)
            self.drawn = torch.cat((self.drawn, key.new_zeros(rows, more, self.samples, key.shape[-1])), 1)
            self.members = torch.cat((self.members, self.members.new_zeros(rows, more)), 1)
        at = torch.where(opens, self.used, near)[there]
        row = torch.arange(rows, device=key.device)[there]
        self.centres[row[opens[there]], at[opens[there]]] = key[opens]
        self.members[row, at] += 1
        takes = self._chance(rows, self.samples, key)[there] * self.members[row, at, None] < 1
        self.drawn[row, at] = torch.where(takes.unsqueeze(-1), key[there][:, None], self.drawn[row, at])
        self.used = self.used + opens

    def _sample(self, key: Tensor, value: Tensor, square: Tensor, there: Tensor) -> None:
        """Each of the s places takes the new key and value with the chance |v|^2 / sum of all |v|^2."""
        square = square.masked_fill(~there, 0)
        self.total = self.total + square
        takes = self._chance(len(key), self.values, key) * self.total[:, None] < square[:, None]
        self.keys = torch.where(takes.unsqueeze(-1), key[:, None], self.keys)
        self.found = torch.where(takes.unsqueeze(-1), value[:, None], self.found)

    def read(self, q: Tensor) -> Partial:
        """An estimate of what queries (R, r, L, d) find, (R, r, L, e), and of the log-denominator (R, r, L)."""
        wide = self.total.dtype
        rows, heads, length, d = q.shape
        q = q.reshape(rows, heads * length, d).to(wide) / math.sqrt(d)
        each = (self.members.to(wide) / self.samples).log().repeat_interleave(self.samples, 1)
        logits = q @ self.drawn.flatten(1, 2).to(wide).transpose(1, 2) + each.unsqueeze(1)
        lse = logits.logsumexp(-1)
        values = self.found.to(wide)
        share = (self.total[:, None] / self.values).log() - values.square().sum(-1).log()
        share = share.where(self.total[:, None] > 0, -torch.inf)
        weights = (q @ self.keys.to(wide).transpose(1, 2) + share.unsqueeze(1) - lse.unsqueeze(-1)).exp()
        out = weights.nan_to_num(0.0) @ values
        return out.to(self.found.dtype).view(rows, heads, length, -1), lse.view(rows, heads, length)

    def select(self, rows: Sequence[int]) -> Sketch:
        """These rows, in this order."""
        made = Sketch(self.delta, self.samples, self.values, self.generator)
        index = torch.tensor(list(rows), device=self.used.device)
        made.centres, made.drawn = self.centres[index], self.drawn[index]
        made.members, made.used = self.members[index], self.used[index]
        made.keys, made.found, made.total = self.keys[index], self.found[index], self.total[index]
        return made


class SketchCache(LayerCache):
    """The cache of a layer whose older tokens are a sketch; the first ones and those since stay as they are."""

    def __init__(self, policy: SubGen, layer: int = 0, layers: int = 1, every: int = 64) -> None:
        super().__init__(policy, layer, layers, every)
        generator = torch.Generator().manual_seed((policy.seed << 16) + layer)
        self.sketch = Sketch(policy.delta, policy.samples, int(policy.keep), generator)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        return super().nbytes + self.sketch.nbytes

    @property
    def counts(self) -> tuple[int, ...]:
        """Keys of each row, those of the sketch included: sampled keys of its clusters, and keys with sampled values."""
        more = [n * self.sketch.samples + self.sketch.values for n in self.sketch.clusters]
        return tuple(a + b for a, b in zip(super().counts, more or [0] * len(super().counts), strict=True))

    def attend(self, q: Tensor) -> Tensor:
        """What the queries (b, h, L, d) of the last L tokens find, (b, h, L, e); of the sketch, an estimate."""
        if not len(self.sketch.used):
            return super().attend(q)
        near = self._near(q)
        first = None if self.kept is None else self.kept.read(q)
        rows = len(self.sketch.used)
        b, h, length, d = q.shape
        out, lse = self.sketch.read(q.reshape(rows, b * h // rows, length, d))
        return joined([first, (out.view(b, h, length, -1), lse.view(b, h, length)), near])

    @torch.no_grad()
    def compress(self, q: Tensor) -> None:
        """Move all tokens but the latest ones into the sketch."""
        if self.keys is None or self.values is None:
            return
        policy = self.policy
        assert isinstance(policy, SubGen)
        n = self.keys.shape[2]
        stays = min(policy.recent, n)
        if self.there is not None and not bool(self.there[:, n - stays :].all()):
            stays = 0
        k, v = self.keys[:, :, : n - stays], self.values[:, :, : n - stays]
        there = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if self.there is None else self.there
        there = there[:, None, : n - stays].expand(k.shape[:3])
        if self.kept is None and n > stays:
            sinks = there & (there.cumsum(-1) <= policy.sink)
            places = torch.arange(n - stays, device=k.device).expand(k.shape[:3])
            self.kept = Segments.kept(k, v, places, sinks)
            there = there & ~sinks
        if n > stays:
            self.sketch.add(k.flatten(0, 1), v.flatten(0, 1), there.flatten(0, 1))
        self.keys, self.values = (x[:, :, n - stays :].clone() for x in (self.keys, self.values))
        self.there = None

    def select(self, samples: Sequence[int]) -> None:
        """Keep these samples of the batch, in this order."""
        if self.keys is not None and len(self.sketch.used):
            g = self.keys.shape[1]
            self.sketch = self.sketch.select([r * g + head for r in samples for head in range(g)])
        super().select(samples)


def layer_cache(
    policy: Rule | Format,
    layer: int = 0,
    layers: int = 1,
    every: int = 64,
    rotation: Rotation | None = None,
) -> LayerCache:
    """The cache of one layer that a policy asks for."""
    if isinstance(policy, Stored) and isinstance(policy.choice, SubGen):
        raise MechanismError(
            f"subgen keeps a sketch of clusters, which no format packs: leave out {policy.format}"
        )
    if isinstance(policy, SubGen):
        return SketchCache(policy, layer, layers, every)
    return LayerCache(policy, layer, layers, every, rotation)
