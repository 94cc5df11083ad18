"""Attention as a filter: a key predicts the query by damped, turning, noisy dynamics, and counts by how likely that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight
from saccade.parts.mask import Causal
from saccade.parts.output import Output
from saccade.parts.reweight import Reweight
from saccade.parts.score import Score, grouped_matmul
from saccade.parts.tokens import On, TokenMap

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile

SLOW = 4.0


def declared(sizes: Sizes, *names: str) -> dict[str, Weight]:
    """One learned number a head each, zero at the start; the noises of measuring start at one."""
    measured = ("afa_eta", "afa_gamma")
    return {n: Weight((sizes.heads,), init="ones" if n in measured else "zeros") for n in names}


def speeds(sizes: Sizes) -> dict[str, Weight]:
    """One speed a key-value head, since keys and values turn with their queries."""
    return {"afa_speed": Weight((sizes.kv_heads,), init="zeros")}


def rate(params: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """mu = -exp(afa_mu - 4), at most zero, (h, 1, 1): states shrink by exp(mu) a step."""
    return -torch.exp(params["afa_mu"].to(dtype) - SLOW)[:, None, None]


def turned(x: Tensor, positions: Tensor, speed: Tensor) -> Tensor:
    """Halves (a, b) of x (B, heads, n, d) as complex a + ib, times exp(i speed position); heads that share a speed follow each other."""
    if x.shape[-1] % 2:
        raise NotSupported(f"turning takes channels in pairs: their number must be even, got {x.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    each = speed.to(wide).repeat_interleave(x.shape[1] // len(speed))
    angle = positions[:, None, :, None].to(wide) * each[:, None, None]
    a, b = x.to(wide).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


@dataclass(frozen=True)
class Turn(TokenMap):
    """q, k and v times exp(-i w position), channels taken as complex numbers, with a learned speed w."""

    name = "afa_turn"
    on = ("q", "k", "v")

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return speeds(sizes)

    def map(self, x: Tensor, positions: Tensor, on: On, c: Context) -> Tensor:
        return turned(x, positions, -c.params["afa_speed"])


@dataclass(frozen=True)
class TurnBack(Output):
    """The output times exp(i w position), so that a value arrives turned by the distance it came."""

    name = "afa_turn_back"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return speeds(sizes)

    def map(self, out: Tensor, c: Context) -> Tensor:
        return turned(out, c.i, c.params["afa_speed"])


@dataclass(frozen=True)
class Residual(Score):
    """s = -tau log(V + R^2 / nu): the log-likelihood of the residual q - E k under a heavy-tailed noise of variance V.

    E = exp(mu |i - j|), R^2 = |q|^2 + E^2 |k|^2 - 2 E q.k, V = sigma^2 (1 - E^2) / (-2 mu) + eta^2 E^2 + gamma^2; tau and nu are
    exponentials of their weights.
    """

    name = "residual"
    breaks = frozenset({"bilinear"})

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        names = ("afa_mu", "afa_sigma", "afa_eta", "afa_gamma", "afa_tau", "afa_nu")
        return declared(sizes, *names)

    def tile(self, t: Tile) -> Tensor:
        q, k, gap = t.q, t.k, (t.i - t.j).abs()
        mu = rate(t.params, q.dtype)
        sigma, eta, gamma = (
            t.params[f"afa_{n}"].to(q.dtype)[:, None, None] for n in ("sigma", "eta", "gamma")
        )
        tau, nu = (t.params[f"afa_{n}"].to(q.dtype).exp()[:, None, None] for n in ("tau", "nu"))
        decay, still = torch.exp(mu * gap), mu == 0
        spread = torch.where(
            still, gap.to(q.dtype), torch.expm1(2 * mu * gap) / (2 * mu.masked_fill(still, -1.0))
        )
        noise = sigma.square() * spread + (eta * decay).square() + gamma.square()
        keys = k.square().sum(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        product = grouped_matmul(q, k.transpose(-1, -2))
        residual = q.square().sum(-1, keepdim=True) + decay * (decay * keys - 2 * product)
        tiny = torch.finfo(q.dtype).tiny
        return -tau * torch.log((noise + residual.clamp_min(0) / nu).clamp_min(tiny))

    def temporaries(self, head_dim: int) -> int:
        return 6


@dataclass(frozen=True)
class Decay(Reweight):
    """w E: what a value has kept of itself on its way, not renormalised."""

    name = "afa_decay"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return declared(sizes, "afa_mu")

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        return w * torch.exp(rate(t.params, w.dtype) * (t.i - t.j).abs())


@system("afa", ref="S141")
def afa() -> Pairwise:
    """Weights by the likelihood of the query under a key's prediction of it, seven scalars a head, as described.

    The isotropic form: a state turns by w and shrinks by exp(mu) a step, is driven by noise sigma and measured with noises eta
    and gamma. (Racioppo, Attention as an Adaptive Filter, 2025.)
    """
    return Pairwise(
        tokens=(Turn(),), pairs=Causal(), score=Residual(), reweight=(Decay(),), output=(TurnBack(),)
    )
