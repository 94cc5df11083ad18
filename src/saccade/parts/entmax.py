"""Weights that are exactly zero for far keys: entmax, and sparsemax as its case alpha = 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.parts.base import arg
from saccade.parts.normalizer import Normalizer

if TYPE_CHECKING:
    from saccade.parts.pair import Tile

ROUNDS = 64
NUMBERS = 1 << 17


@dataclass(frozen=True)
class Entmax(Normalizer):
    """w = max(0, (alpha - 1) s - tau)^(1 / (alpha - 1)) with the tau that makes each row sum to one.

    alpha = 1 is softmax, 2 is sparsemax; keys further below the row's maximum than 1 / (alpha - 1) weigh exactly zero.
    (Peters, Niculae and Martins, Sparse Sequence-to-Sequence Models, 2019; Martins and Astudillo, From Softmax to
    Sparsemax, 2016.)
    """

    alpha: float = arg(1.5, at_least=1.0)

    name = "entmax"
    held = (2, 6)
    gives = frozenset({"positive"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 < self.alpha < 1.01:
            raise MechanismError(
                f"entmax: alpha must be 1 or at least 1.01, below which powers round, got {self.alpha}"
            )

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        if self.alpha == 1:
            empty = torch.isneginf(s.detach()).all(-1, keepdim=True)
            return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0), None
        weights: Tensor = _Entmax.apply(s, self.alpha)
        return weights, None


class _Entmax(torch.autograd.Function):
    """The backward pass needs the weights alone: with u = w^(2 - alpha), dw/ds = diag(u) - u u^T / sum u."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: float) -> Tensor:
        flat = s.reshape(-1, s.shape[-1])
        w = torch.empty_like(flat)
        step = max(1, NUMBERS // max(1, s.shape[-1]))
        find = _newton if alpha <= 2 else _bisect
        for rows, out in zip(flat.split(step), w.split(step), strict=True):
            top = rows.amax(-1, keepdim=True)
            x = torch.sub(rows, top.masked_fill_(torch.isneginf(top), 0.0), out=out).mul_(alpha - 1)
            find(x, 1 / (alpha - 1))
        w = w.view(s.shape)
        ctx.save_for_backward(w)
        ctx.alpha = alpha
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        u = _power(w, 2 - ctx.alpha)
        moved = grad * u
        total = u.sum(-1, keepdim=True)
        share = moved.sum(-1, keepdim=True) / total.masked_fill_(total == 0, 1.0)
        return moved.sub_(share * u), None


def _power(x: Tensor, p: float) -> Tensor:
    """x^p of numbers that are not negative, where 0^p is 0 also for p <= 0."""
    if p == 0:
        return x.sign()
    if p == 0.5:
        return x.sqrt()
    return x.pow(p) if p > 0 else x.pow(p).masked_fill_(x == 0, 0.0)


def _newton(x: Tensor, p: float) -> None:
    """x, with maximum 0, to the weights, in place, for p >= 1.

    The p-norm of max(0, x - tau) is convex in tau and at least 1 at tau = -1, so Newton's method climbs to the root and
    never beyond it; it ends where no row moves by more than rounding.
    """
    tau = x.new_full((x.shape[0], 1), -1.0)
    small = 2 * torch.finfo(x.dtype).eps
    y = torch.empty_like(x)
    for _ in range(ROUNDS):
        torch.sub(x, tau, out=y).clamp_min_(0.0)
        powers = _power(y, p - 1)
        norm = y.mul_(powers).sum(-1, keepdim=True).pow_(1 / p)
        slope = powers.sum(-1, keepdim=True) / norm.pow(p - 1)
        step = ((norm - 1) / slope).nan_to_num_(0.0).clamp_min_(0.0)
        tau += step
        if not bool((step > small).any()):
            break
    _finish(x, tau, p)


def _bisect(x: Tensor, p: float) -> None:
    """The same for p < 1, where no convexity helps: halve the bracket of log(-tau)."""
    keys = (x > -torch.inf).sum(-1, keepdim=True).clamp_min_(1).to(x.dtype)
    low, high = -keys.log() / p, torch.zeros_like(keys)
    for _ in range(-round(math.log2(torch.finfo(x.dtype).eps)) + 8):
        middle = (low + high) / 2
        heavy = (x + middle.exp()).clamp_min_(0.0).pow_(p).sum(-1, keepdim=True) > 1
        low, high = torch.where(heavy, low, middle), torch.where(heavy, middle, high)
    _finish(x, -low.exp(), p)


def _finish(x: Tensor, tau: Tensor, p: float) -> None:
    """Weights of the last tau, their sum brought to one exactly."""
    x.sub_(tau).clamp_min_(0.0).pow_(p)
    total = x.sum(-1, keepdim=True)
    x.div_(total.masked_fill_(total == 0, 1.0))
