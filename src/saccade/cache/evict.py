"""Policies that drop keys by a score of each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache.policy import Policy, Sight
from saccade.cache.premise import LEAST_SPREAD, spread
from saccade.errors import MechanismError


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first tokens and the last ones (Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2024)."""

    name = "streaming_llm"

    def scores(self, sight: Sight) -> Tensor:
        return sight.positions.float()


@dataclass(frozen=True)
class AtRandom(Policy):
    """Keys drawn at random: what every other choice has to beat."""

    seed: int = 0

    name = "at_random"

    def scores(self, sight: Sight) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 40) + (sight.layer << 32) + sight.length)
        return torch.rand(sight.positions.shape, generator=generator).to(sight.k.device)


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keys of small norm; the first `skip` layers keep all. Warns where all norms of a layer are alike, as in models that
    normalise their keys: `saccade.cache.premise` measures whether the norm foretells attention.

    (Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, 2024.)
    """

    skip: int = 0

    name = "l2_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip < 0:
            raise MechanismError(f"l2_norm: skip is a number of layers, at least 0, got {self.skip}")

    def budget(self, sight: Sight) -> Tensor:
        return sight.counts if sight.layer < self.skip else super().budget(sight)

    def scores(self, sight: Sight) -> Tensor:
        norms = sight.k.float().norm(dim=-1)
        drops = sight.counts > self.budget(sight)
        if bool(drops.any() & (spread(norms, sight.there) < LEAST_SPREAD)[drops].all()):
            warnings.warn(
                f"l2_norm: the keys of every head of layer {sight.layer} have all the same norm, so it says nothing about them; "
                "does the model normalise its keys? Use snapkv, tova or h2o",
                stacklevel=2,
            )
        return -norms


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keys that the last `window` queries weigh most, smoothed over `kernel` neighbours (Li et al., SnapKV, 2024)."""

    window: int = 32
    kernel: int = 7

    name = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise MechanismError(
                f"snapkv: window is at least 1 and kernel odd, got window={self.window} and kernel={self.kernel}"
            )

    def scores(self, sight: Sight) -> Tensor:
        weights = sight.weights(self.window).sum(2)
        return F.max_pool1d(weights, self.kernel, 1, self.kernel // 2)


@dataclass(frozen=True)
class Tova(Policy):
    """Keys that the last query weighs most, the mean of all heads (Oren et al., Transformers are Multi-State RNNs, 2024)."""

    name = "tova"

    def scores(self, sight: Sight) -> Tensor:
        return sight.weights(1)[:, :, 0].mean(1, keepdim=True).expand_as(sight.positions)


@dataclass(frozen=True)
class H2O(Policy):
    """Keys with the most weight received so far (Zhang et al., H2O: Heavy-Hitter Oracle, 2023)."""

    name = "h2o"
    mass = True

    def scores(self, sight: Sight) -> Tensor:
        assert sight.mass is not None
        return sight.mass


@dataclass(frozen=True)
class A2SF(H2O):
    """As h2o, with weight from a query t tokens ago worth `forget`^t of it; 1 is h2o, 0 counts the last query alone.

    (Jo and Shin, A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, 2024.)
    """

    forget: float = 0.9

    name = "a2sf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.forget <= 1:
            raise MechanismError(f"a2sf: forget is a factor of 0 to 1, got {self.forget!r}")

    @property
    def forgetting(self) -> float:
        return self.forget


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """As snapkv, with a budget that falls from the first layer to the last; all together they keep `keep`.

    The first layer keeps 2 - 1 / `slope` times the mean, the last one 1 / slope. (Cai et al., PyramidKV, 2024.)
    """

    slope: float = 8.0

    name = "pyramidkv"

    def budget(self, sight: Sight) -> Tensor:
        mean = super().budget(sight).float()
        last = 1 / self.slope
        share = 1.0 if sight.layers == 1 else 2 - last - (2 - 2 * last) * sight.layer / (sight.layers - 1)
        least = self.sink + self.recent
        return (mean * share).ceil().long().clamp_min(least)


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """As snapkv, with one budget for all heads of a layer: the best keys of any head stay, `floor` of it is each head's own.

    (Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, 2024.)
    """

    floor: float = 0.2

    name = "adakv"

    def budget(self, sight: Sight) -> Tensor:
        return shared(self, sight, super().budget(sight), self.floor)


def shared(policy: Policy, sight: Sight, own: Tensor, floor: float) -> Tensor:
    """Budgets (b, g) that add up to those of each head, `own` (b, g): `floor` of it is the head's, the best keys share the rest."""
    n = sight.positions.shape[-1]
    worth = policy.worth(sight)
    base = (own.float() * floor).long().clamp_min(policy.sink + policy.recent)
    free = int((own - base).sum(1).amax())
    if free <= 0:
        return own
    order = worth.argsort(-1, descending=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=order.device).expand_as(order))
    rest = worth.masked_fill(rank < base.unsqueeze(-1), -torch.inf).flatten(1)
    best = rest.topk(min(free, rest.shape[1]), dim=1)
    extra = torch.zeros_like(base).scatter_add_(1, best.indices // n, best.values.isfinite().long())
    return base + extra
