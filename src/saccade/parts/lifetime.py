"""How long a token stays readable: always, until the next token that stays always, or for a window.

Legend: b batch, h query heads, L queries, S keys, Q x K one tile. Types are 0 global, 1 local, 2 sliding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.parts.base import Sizes, Stream, arg
from saccade.parts.normalizer import Normalizer
from saccade.parts.select import Select
from saccade.parts.selection import Lives

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile

GLOBAL, LOCAL, SLIDING = range(3)
FOREVER = torch.iinfo(torch.int32).max  # the last reader of a global token
OPEN = FOREVER - 1  # of a local token that no global one has followed yet


def last_readers(types: Tensor, positions: Tensor, window: int) -> Tensor:
    """The position of the last query that reads each token, from types (..., S) at positions (S,) in a row."""
    following = torch.where(types == GLOBAL, positions, OPEN + 1)
    following = following.flip(-1).cummin(-1).values.flip(-1)
    following = torch.cat((following[..., 1:], torch.full_like(following[..., :1], OPEN + 1)), -1)
    return torch.where(
        types == GLOBAL, FOREVER, torch.where(types == LOCAL, following - 1, positions + window - 1)
    )


@dataclass(frozen=True)
class Lifetime(Select):
    """Each token is read always (global), until the next global token (local), or by `window` queries (sliding).

    The stream `lifetime` holds three logits a head and token, of which the greatest decides; no gradient flows through the
    choice, `lifetime_softmax` trains it. Where heads share keys each has lifetimes of its own. A state drops what no
    later query can read. (Deng et al., Neural Attention Search, 2025.)
    """

    window: int = arg(64, at_least=1)

    name = "lifetime"
    looks_back = True

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"lifetime": Stream("k", width=3)}

    @torch.no_grad()
    def choose(self, c: Context) -> Lives:
        return Lives(last_readers(c.streams["lifetime"].argmax(-1), c.j[0], self.window), c.i, c.start)


@dataclass(frozen=True)
class LifetimeSoftmax(Normalizer):
    """w_ij = m_ij exp(s_ij) / sum_j m_ij exp(s_ij), m_ij the odds that token j is still alive for query i.

    m_ij = G_j + S_j [i - j < window] + L_j prod_{j < n <= i} (1 - G_n), where G, L and S are a softmax of the stream
    `lifetime`. With `hard` the weights are those of `lifetime` and the gradient of m is the one written here, also
    for pairs that are dead. The loss `kept` is the mean share of the earlier tokens that a query keeps. (Deng et al.,
    Neural Attention Search, 2025.)
    """

    window: int = arg(64, at_least=1)
    hard: bool = True

    name = "lifetime_softmax"
    reach = "sweep"
    needs = frozenset({"key order"})
    gives = frozenset({"positive"})
    held = (9, 12)

    @property
    def straight_through(self) -> bool:  # type: ignore[override]
        return self.hard

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"lifetime": Stream("k", width=3)}

    def normalize(self, s: Tensor, t: Tile | None = None) -> tuple[Tensor, None]:
        assert t is not None
        alive = self.alive(t).to(s.dtype)
        there = (alive > 0) & ~torch.isneginf(s)
        top = s.detach().masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(torch.isneginf(top), 0.0)
        e = (s - top).clamp_max(
            30.0
        ).exp() * alive  # above 0 are dead pairs alone, of which a gradient is left
        total = e.sum(-1, keepdim=True)
        return e / total.masked_fill(total == 0, 1.0), None

    def alive(self, t: Tile) -> Tensor:
        """m (b, h, Q, K) of a tile whose keys stand in a row."""
        logits, j = t.streams["lifetime"], t.j[0, 0, 0]
        odds = logits.softmax(-1)
        spared = _spared(logits)
        own = (t.i[:, 0, :, 0] - j[0]).clamp(0, j.numel() - 1)
        at = spared.gather(2, own[:, None].expand(*spared.shape[:2], -1))
        between = (at.unsqueeze(-1) - spared.unsqueeze(-2)).clamp_max(0.0).exp()
        g, local, sliding = (x.unsqueeze(-2) for x in odds.unbind(-1))
        m = g + sliding * (t.i - t.j < self.window) + local * between
        if not self.hard:
            return m
        last = last_readers(logits.argmax(-1), j, self.window).unsqueeze(-2)
        return m + ((t.i <= last).to(m.dtype) - m).detach()

    def losses(self, c: Context) -> dict[str, Tensor]:
        logits = c.streams["lifetime"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        there = (c.j < c.key_ends[:, None])[:, None]
        left = (c.key_ends[:, None, None] - c.j[:, None]).clamp_min(0).to(logits.dtype)
        spared = _spared(logits).masked_fill(~there, -1e30)
        ahead = spared.flip(-1).logcumsumexp(-1).flip(-1) - spared
        g, local, sliding = logits.softmax(-1).unbind(-1)
        kept = g * left + sliding * left.clamp_max(self.window) + local * ahead.exp()
        pairs = c.key_ends * (c.key_ends + 1) / 2
        share = kept.masked_fill(~there, 0.0).sum(-1) / pairs.clamp_min(1)[:, None]
        return {"kept": share.mean()}


def _spared(logits: Tensor) -> Tensor:
    """The log odds that none of the tokens up to each one is global, (b, h, S) from (b, h, S, 3)."""
    return (logits[..., 1:].logsumexp(-1) - logits.logsumexp(-1)).cumsum(-1)
