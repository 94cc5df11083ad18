"""Keys that a learned score keeps for every later query: a running top-k, weighted by a projection.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, n rows of a batch of score lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.parts.base import Side, Sizes, Weight, arg
from saccade.parts.reweight import Reweight
from saccade.parts.select import Select
from saccade.parts.selection import Floors

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile

BLOCK = 64


def threshold(u: Tensor, count: int) -> Tensor:
    """The tau (...) at which clip(u - tau, 0, 1) sums to `count`, for scores u (..., S); -inf where at most `count` are finite."""
    flat = u.reshape(-1, u.shape[-1])
    best, order = flat.sort(-1, descending=True)
    return _thresholds(best, (order >= 0)[:, None], count).view(u.shape[:-1])


def _thresholds(best: Tensor, open_: Tensor, count: int) -> Tensor:
    """The same (n, B) for some of the scores best (n, S), which fall: those that are open (n, B, S).

    The sum is piecewise linear in tau with its kinks at u and u - 1, of open scores and others: the piece that holds the
    answer is solved; where a whole stretch is level, its middle is taken.
    """
    real = ~torch.isneginf(best)
    top = best[:, :1].masked_fill(~real[:, :1], 0.0)
    best = torch.where(real, best - top, -torch.inf)  # sums round least around the maximum
    open_ = open_ & real[:, None]
    ends, falling = best.masked_fill(~real, 0.0), (-best).contiguous()
    many = torch.nn.functional.pad(open_.cumsum(-1, dtype=best.dtype), (1, 0))
    sums = torch.nn.functional.pad((ends[:, None] * open_).cumsum(-1), (1, 0))

    def excess(x: Tensor) -> Tensor:
        above = torch.searchsorted(falling, -x)[:, None].expand(*open_.shape[:2], -1)
        return sums.gather(-1, above) - many.gather(-1, above) * x[:, None]

    kinks = torch.cat((ends, ends - 1), -1).sort(-1).values
    covered, slack = excess(kinks) - excess(kinks + 1), 16 * count * torch.finfo(best.dtype).eps
    at = ((covered > count - slack).sum(-1) - 1).clamp(0, max(0, kinks.shape[-1] - 2))
    low, high = kinks.gather(-1, at), kinks.gather(-1, at + 1)
    inside = (low + high) / 2
    support, ones = (torch.searchsorted(falling, -x).unsqueeze(-1) for x in (inside, inside + 1))
    total = (sums.gather(-1, support) - sums.gather(-1, ones) + many.gather(-1, ones) - count).squeeze(-1)
    active = (many.gather(-1, support) - many.gather(-1, ones)).squeeze(-1)
    solved = (total / active.clamp_min(1)).clamp(low, high)
    level = (covered - count).abs() <= slack
    first = kinks[:, None].masked_fill(~level, torch.inf).amin(-1)
    last = kinks[:, None].masked_fill(~level, -torch.inf).amax(-1)
    tau = torch.where(first < last, (first + last) / 2, solved) + top
    return tau.masked_fill(many[..., -1] <= count, -torch.inf)


class _SparseK(torch.autograd.Function):
    """m = clip(u - tau, 0, 1); backward subtracts from each active gradient the mean of the active ones."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, count: int) -> Tensor:
        m = (u - threshold(u, count).unsqueeze(-1)).clamp(0, 1)
        ctx.save_for_backward(m)
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        active = (m > 0) & (m < 1)
        held = grad * active
        mean = held.sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp_min(1)
        return (held - mean) * active, None


def sparsek_weights(u: Tensor, count: int) -> Tensor:
    """The nearest point to u (..., S) with entries in [0, 1] that sum to `count`; ones where there are no more than that.

    (Lou et al., Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers, 2024.)
    """
    m: Tensor = _SparseK.apply(u, count)
    return m


def over_prefixes(x: Tensor, first: int, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `rule` says of the prefixes of x (n, S) that end at `first` and after: (n, S - first).

    The rule is given scores (n, W) that fall and which of them are open (n, B, W), and answers (n, B). The answer must not
    fall as a prefix grows, nor depend on scores below it: those are let go.
    """
    held, found = x[:, :first], []
    for lo in range(first, x.shape[1], BLOCK):
        new = x[:, lo : lo + BLOCK]
        pool, order = torch.cat((held, new), 1).sort(-1, descending=True)
        ends = torch.arange(new.shape[1], device=x.device) + held.shape[1]
        found.append(rule(pool, order[:, None] <= ends[:, None]))
        held = pool[:, : int((pool >= found[-1][:, -1:]).sum(-1).max())]
    return torch.cat(found, 1) if found else x[:, :0]


class _Thresholds(torch.autograd.Function):
    """tau of every prefix. An entry is active for a stretch of prefixes, since tau never falls: sums of stretches do."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, first: int, count: int) -> Tensor:
        tau = over_prefixes(u, first, lambda best, open_: _thresholds(best, open_, count))
        ctx.save_for_backward(u, tau)
        ctx.first = first
        return tau

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u, tau = ctx.saved_tensors
        born = (torch.arange(u.shape[1], device=u.device) - ctx.first).clamp_min(0)
        start = torch.maximum(torch.searchsorted(tau, (u - 1).contiguous(), right=True), born)
        end = torch.maximum(torch.searchsorted(tau, u.contiguous()), start)
        steps = u.new_zeros(u.shape[0], tau.shape[1] + 1)
        one = torch.ones_like(u)
        active = steps.scatter_add(1, start, one).scatter_add_(1, end, -one).cumsum(1)[:, :-1]
        share = torch.where(active > 0.5, grad / active.clamp_min(1), 0.0)
        sums = torch.nn.functional.pad(share.cumsum(1), (1, 0))
        return sums.gather(1, end) - sums.gather(1, start), None, None


def _scores(c: Context) -> Tensor:
    """u (b, g, S), float32 or wider: a learned linear form of each key and its value, zero at padding."""
    wide = torch.promote_types(c.k.dtype, torch.float32)
    w = c.params["key_scorer"].to(wide)[:, None]
    return (torch.cat((c.k, c.v), -1).to(wide) * w).sum(-1)


def _weight(sizes: Sizes) -> dict[str, Weight]:
    width = sizes.head_dim + sizes.value_dim
    return {"key_scorer": Weight((sizes.kv_heads, width), std=width**-0.5)}


def _prefix(c: Context, before: int) -> tuple[Tensor, int]:
    """The last key that may be chosen for every row, (b or 1, L), and the least of them that is a key."""
    last = c.i - c.start - before if c.looks_back else torch.full_like(c.i, c.k.shape[2] - 1)
    last = last.clamp_max(c.k.shape[2] - 1)
    return last, max(0, int(last.min()))


def _of_rows(x: Tensor, last: Tensor, first: int, shape: tuple[int, int]) -> Tensor:
    """What was found for prefixes (n, S - first), for the rows: (b, g, L)."""
    b, g = shape
    at = (last - first).clamp_min(0)[:, None].expand(b, g, -1)
    return x.view(b, g, -1).gather(-1, at)


@dataclass(frozen=True)
class ScoredKeys(Select):
    """The `top` keys of the highest learned score among those at least `before` back: the same for every query head.

    The score does not look at the query, so a key that was let go never returns, and a later query needs no other keys.
    Of equal scores the earlier key stays. (Lou et al., Sparser is Faster and Less is More, 2024.)
    """

    top: int = arg(32, at_least=1)
    before: int = arg(0, at_least=0)

    name = "scored_keys"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return _weight(sizes)

    @torch.no_grad()
    def choose(self, c: Context) -> Floors:
        b, g, keys, _ = c.k.shape
        u = _scores(c)
        if c.valid is not None:
            u = u.masked_fill(~c.valid[:, None], -torch.inf)
        order = u.flatten(0, 1).argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(keys, 0, -1, device=u.device, dtype=torch.float64).expand_as(order)
        rank = torch.zeros_like(place).scatter(1, order, place)
        last, first = _prefix(c, self.before)

        def least(best: Tensor, open_: Tensor) -> Tensor:
            at = (open_.cumsum(-1) < self.top).sum(-1)
            return torch.nn.functional.pad(best, (0, 1), value=-torch.inf).gather(-1, at)

        floor = _of_rows(over_prefixes(rank, first, least), last, first, (b, g))
        repeat = c.q.shape[1] // g
        rank, floor = (x.repeat_interleave(repeat, 1) for x in (rank.view(b, g, keys), floor))
        return Floors(rank, floor, last + c.start if c.looks_back else None)


@dataclass(frozen=True)
class ScoreGate(Reweight):
    """w clip(u - tau, 0, 1) for keys at least `before` back, tau so that the gates of all these keys sum to `top`.

    u is the learned score by which `scored_keys` chooses; through the gate it learns. (Lou et al., 2024: SparseK.)
    """

    top: int = arg(32, at_least=1)
    before: int = arg(0, at_least=0)

    name = "score_gate"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return _weight(sizes)

    def extras(self, c: Context) -> dict[str, tuple[Side, Tensor]]:
        b, g, _, _ = c.k.shape
        u = _scores(c)
        real = u if c.valid is None else u.masked_fill(~c.valid[:, None], -torch.inf)
        last, first = _prefix(c, self.before)
        found: Tensor = _Thresholds.apply(real.flatten(0, 1), first, self.top)
        tau, repeat = _of_rows(found, last, first, (b, g)), c.q.shape[1] // g
        return {
            "key_score": ("k", u.repeat_interleave(repeat, 1)),
            "score_floor": ("q", tau.repeat_interleave(repeat, 1)),
        }

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        u, tau = t.streams["key_score"].unsqueeze(-2), t.streams["score_floor"].unsqueeze(-1)
        gate = (u - tau).clamp(0, 1)
        return w * torch.where(t.j > t.i - self.before, 1.0, gate).to(w.dtype)
