"""Formats that pack what a policy keeps to integers of a few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.cache.bases import (
    Bases,
    covariance,
    hadamard,
    random_rotation,
    spectral,
)
from saccade.cache.packed import PackedSegments
from saccade.cache.policy import Format, Sight
from saccade.cache.segments import Segments
from saccade.errors import MechanismError
from saccade.plan import attend

ROTATIONS = ("none", "random", "hadamard", "spectral")
SEEN = 128
"""Queries whose outputs give the basis of values."""


@dataclass(frozen=True)
class Kivi(Format):
    """Integers of `bits` bits, keys in groups of tokens of one channel, values in groups of channels of one token.

    The `residual` last tokens of a row, the `sink` first ones, and fewer than `group` between stay as they are. A packed
    number takes bits + 32 / group bits. (Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024.)
    """

    bits: int = 2
    group: int = 64
    residual: int = 64
    sink: int = 0
    rotation: str = "none"
    seed: int = 0

    name = "kivi"
    by_channel = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise MechanismError(f"{self.name}: bits is 2, 4 or 8, got {self.bits!r}")
        if self.group < 8 or self.group % 8:
            raise MechanismError(f"{self.name}: group is a multiple of 8 numbers, got {self.group!r}")
        if self.residual < 0 or self.sink < 0:
            raise MechanismError(
                f"{self.name}: residual and sink are at least 0 tokens, got {self.residual} and {self.sink}"
            )
        if self.rotation not in ROTATIONS:
            raise MechanismError(
                f"{self.name}: rotation is one of {', '.join(ROTATIONS)}, got {self.rotation!r}"
            )

    @property
    def block(self) -> int:
        """Tokens that are packed together."""
        return self.group if self.by_channel else 32

    def bases(self, sight: Sight) -> Bases | None:
        widths = sight.k.shape[-1], sight.v.shape[-1]
        device = sight.k.device
        if self.rotation == "none":
            return None
        if self.rotation == "spectral":
            return calibrated(sight)
        k, v = (hadamard(d) if self.rotation == "hadamard" else random_rotation(d, self.seed) for d in widths)
        return Bases(k.to(device, torch.float32)[None], v.to(device, torch.float32)[None])

    def store(
        self, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor, bases: Bases | None
    ) -> tuple[PackedSegments, Segments]:
        place = keep.cumsum(-1) - 1
        spare = (keep.sum(-1, keepdim=True) - self.sink - self.residual).clamp_min(0)
        packs = keep & (place >= self.sink) & (place < self.sink + spare // self.block * self.block)
        packed = PackedSegments.of(
            k,
            v,
            positions,
            packs,
            bits=self.bits,
            group=self.group,
            block=self.block,
            by_channel=self.by_channel,
            bases=bases,
        )
        return packed, Segments.kept(k, v, positions, keep & ~packs)


@dataclass(frozen=True)
class Oscar(Kivi):
    """Groups of channels of one token, after a rotation that the queries' covariance gives, U H P; likewise for values.

    Magnitudes above the share `clip` of those seen when it is found are clipped. The rotation is found from the first text
    that a layer reads, or is given as `offline`, the bases of every layer. (Zhou et al., OSCAR, 2026.)
    """

    bits: int = 2
    group: int = 128
    residual: int = 256
    sink: int = 64
    rotation: str = "spectral"
    clip: float = 1.0
    offline: tuple[Bases, ...] | None = field(default=None, repr=False, compare=False)

    name = "oscar"
    by_channel = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip <= 1:
            raise MechanismError(
                f"oscar: clip is a share of magnitudes above 0 and at most 1, got {self.clip!r}"
            )

    def bases(self, sight: Sight) -> Bases | None:
        if self.offline is not None:
            if len(self.offline) != sight.layers:
                raise MechanismError(
                    f"oscar: {len(self.offline)} bases are given for a model of {sight.layers} layers; give one a layer"
                )
            return self.offline[sight.layer]
        found = super().bases(sight)
        if found is None or self.clip == 1:
            return found
        taus = [
            torch.stack(
                [_quantile(x[:, n][sight.there[:, n]].abs().flatten(), self.clip) for n in range(x.shape[1])]
            )
            for x in found.stored(sight.k, sight.v)
        ]
        return Bases(found.k, found.v, *taus)


def calibrated(sight: Sight) -> Bases:
    """The bases of OSCAR for what a layer sees: of its queries, and of what the last `SEEN` of them find, S V.

    One basis for each head of all samples together.
    """
    q = sight.q
    rows = min(SEEN, q.shape[2])
    mask = sight.there.repeat_interleave(q.shape[1] // sight.k.shape[1], 1)[:, :, None]
    found = attend(q[:, :, -rows:], sight.k, sight.v, "causal", mask=mask)
    keys = covariance(q, sight.there[:, :, -q.shape[2] :])
    values = covariance(found, sight.there[:, :, -rows:])
    return Bases(spectral(keys).float(), spectral(values).float())


def _quantile(x: Tensor, share: float) -> Tensor:
    """The smallest of the numbers (n,) that at least this share of them does not exceed."""
    return x.kthvalue(max(1, math.ceil(share * len(x)))).values
