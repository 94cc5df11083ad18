"""Key lists from scored units of any length, and chunks of text that a small net cuts.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, U units, T keys a query may read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, pad

from saccade.parts.base import Causality, Sizes, Weight, arg
from saccade.parts.budget import Budget, Top
from saccade.parts.score import grouped_matmul
from saccade.parts.select import ROWS, Choice
from saccade.parts.selection import Blocks

if TYPE_CHECKING:
    from saccade.parts.pair import Context


def fill(scores: Tensor, lo: Tensor, hi: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The first `top` keys of units [lo, hi), best unit first: index and valid (b, h, Q, top) for scores (b, h, Q, U).

    lo and hi broadcast to the scores; empty units and those of score -inf give nothing. Of equal units the first is
    taken first; a unit that does not fit whole gives its last keys.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    width = (hi - lo).clamp_min(0).expand_as(scores).masked_fill(torch.isneginf(scores), 0).gather(-1, order)
    filled = width.cumsum(-1)
    slots = torch.arange(top, device=scores.device).expand(*scores.shape[:3], top).contiguous()
    unit = torch.searchsorted(filled, slots, right=True).clamp_max(scores.shape[-1] - 1)
    inside = slots - (filled - width).gather(-1, unit)
    index = hi.expand_as(scores).gather(-1, order.gather(-1, unit)) - 1 - inside
    valid = slots < filled[..., -1:]
    return index.masked_fill(~valid, 0), valid


def window_means(x: Tensor, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of the `width` tokens before each token of x (b, n, S, d) and of those from it on; zeros where there are none."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = x.new_ones(1, 1, x.shape[2], 1) if valid is None else valid[:, None, :, None].to(x.dtype)
    x = x if valid is None else x.masked_fill(~valid[:, None, :, None], 0)
    sums, counts = (pad(y.cumsum(2), (0, 0, 1, 0)) for y in (x, kept))
    at = torch.arange(x.shape[2] + 1, device=x.device)
    before, after = (at - width).clamp_min(0), (at + width).clamp_max(x.shape[2])
    left = (sums - sums[:, :, before]) / (counts - counts[:, :, before]).clamp_min(1)
    right = (sums[:, :, after] - sums) / (counts[:, :, after] - counts).clamp_min(1)
    return left[:, :, :-1], right[:, :, :-1]


def peaks(x: Tensor, gap: int) -> Tensor:
    """Where x (b, S) is the greatest of all less than `gap` away, the first of equals."""
    around = pad(x, (gap - 1, gap - 1), value=-torch.inf).unfold(-1, 2 * gap - 1, 1)
    after = (x.unsqueeze(-1) >= around[..., gap - 1 :]).all(-1)
    return after & (x.unsqueeze(-1) > around[..., : gap - 1]).all(-1) if gap > 1 else after


@dataclass(frozen=True)
class TopChunks(Choice):
    """The `top` keys of the chunks that score highest; a net cuts the chunks where the keys change, or `every` so many.

    A chunk stands for its tokens by the root of their number times their mean, of queries and of keys. The net of each
    key-value head sees the mean keys of the `window` tokens before and after a cut, and the heads' votes add up; cuts are
    at least `gap` apart. It learns from the loss `boundary`, against `split_labels`.

    A cut looks `window + gap` tokens ahead and a query's chunk holds later queries: the choice leaks, and is meant for
    prefill. With `past` it is made from the past alone: a query asks by itself, and what follows the last cut that it can
    know of is read first. (Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs,
    2025.)
    """

    top: int = arg(64, at_least=1)
    window: int = arg(8, at_least=1)
    gap: int = arg(4, at_least=1)
    hidden: int = arg(16, at_least=1)
    every: int | None = arg(None, at_least=1)
    past: bool = False

    name = "top_chunks"
    own = True

    @property
    def size(self) -> int:
        return 1

    @property
    def keep(self) -> Budget:
        return Top(self.top)

    @property
    def causal(self) -> Causality:  # type: ignore[override]
        return "safe" if self.past else "leak"

    @property
    def ahead(self) -> int:
        """How far behind a query a cut must stand to be known to it."""
        return 0 if self.every else self.window + self.gap - 2

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        if self.every:
            return {}
        g, width = sizes.kv_heads, 4 * sizes.head_dim + 1
        return {
            "boundary_in": Weight((g, width, self.hidden), std=width**-0.5),
            "boundary_bias": Weight((g, self.hidden), init="zeros"),
            "boundary_out": Weight((g, self.hidden), std=self.hidden**-0.5),
            "boundary_rate": Weight((1,), init="zeros"),
        }

    def flops(self, rows: int, keys: int, head_dim: int, looks_back: bool) -> int:
        chunks = keys // (self.every or 2 * self.gap) + 1
        net = 0 if self.every else 2 * keys * (4 * head_dim + 2) * self.hidden
        return net + 2 * head_dim * chunks * (rows if self.past else min(rows, chunks))

    def boundary(self, c: Context) -> Tensor:
        """Logits (b, S) that a chunk begins at a key."""
        left, right = (normalize(x, dim=-1) for x in window_means(c.k, self.window, c.valid))
        alike = (left * right).sum(-1, keepdim=True)
        seen = torch.cat((left, right, (left - right).abs(), left * right, alike), -1)
        into, bias, out, rate = (
            c.params[f"boundary_{n}"].to(seen.dtype) for n in ("in", "bias", "out", "rate")
        )
        hidden = torch.relu(seen @ into + bias[:, None])
        logits = (hidden @ out.unsqueeze(-1)).squeeze(-1).mean(1) + rate
        return logits if c.valid is None else logits.masked_fill(~c.valid, -torch.inf)

    def starts(self, c: Context) -> Tensor:
        """Where a chunk begins, (b, S)."""
        b, keys = c.k.shape[0], c.k.shape[2]
        at = torch.arange(keys, device=c.k.device)
        if self.every:
            return (at % self.every == 0).expand(b, -1)
        logits = self.boundary(c)
        return (peaks(logits, self.gap) & (logits > 0)) | (at == 0)

    @torch.no_grad()
    def choose(self, c: Context) -> Blocks:
        b, h, rows, _ = c.q.shape
        starts, keys, device = self.starts(c), c.k.shape[2], c.q.device
        if c.valid is not None:
            starts = starts & c.valid
        chunk = (starts.cumsum(-1) - 1).clamp_min(0)
        count = int(starts.sum(-1).max()) if starts.numel() else 0
        lo = torch.full((b, count + 1), keys, device=device)
        lo.scatter_(
            1, torch.where(starts, chunk, count), torch.where(starts, torch.arange(keys, device=device), keys)
        )
        lo = lo.minimum(c.key_ends[:, None]) if count else lo
        lo[:, count:] = c.key_ends[:, None]
        lo, hi = lo[:, :-1], lo[:, 1:]
        mine = chunk.gather(1, (c.i - c.start).clamp(0, max(0, keys - 1)).expand(b, -1))
        keys_of = _totals(c.k, chunk, count, c.valid)
        queries = c.q.to(keys_of.dtype) if self.past else _totals(c.q, mine, count, c.query_valid)
        queries = queries * c.q.shape[-1] ** -0.5
        most = min(self.top, keys)
        index = torch.zeros(b, h, rows, most, dtype=torch.long, device=device)
        valid = torch.zeros(b, h, rows, most, dtype=torch.bool, device=device)
        table = None if self.past else grouped_matmul(queries, keys_of.transpose(-1, -2))
        for r0 in range(0, rows, ROWS):
            cut = slice(r0, min(rows, r0 + ROWS))
            i = (c.i - c.start)[:, None, cut, None]
            first, last = (x[:, None, None].expand(b, 1, i.shape[2], count) for x in (lo, hi))
            if table is not None:
                at = mine[:, None, cut, None].expand(b, h, -1, count)
                scores = table.gather(2, at)
            else:
                scores = grouped_matmul(queries[:, :, cut], keys_of.transpose(-1, -2))
            if c.looks_back and self.past:
                known = last + self.ahead <= i
                tail = torch.where(known, last, 0).amax(-1, keepdim=True)
                scores = torch.cat(
                    (scores.masked_fill(~known, -torch.inf), scores[..., :1] * 0 + torch.inf), -1
                )
                first, last = torch.cat((first, tail), -1), torch.cat((last, i.expand_as(tail) + 1), -1)
            elif c.looks_back:
                last = last.minimum(i + 1)
            index[:, :, cut], valid[:, :, cut] = fill(scores, first, last, most)
        return Blocks(index, valid, 1, 1)

    def losses(self, c: Context) -> dict[str, Tensor]:
        if self.every:
            return {}
        labels = split_labels(c, self.window, self.gap).to(c.q.dtype)
        logits = self.boundary(c).to(c.q.dtype)
        if c.valid is not None:
            labels, logits = labels[c.valid], logits[c.valid]
        rare = (labels.numel() / labels.sum().clamp_min(1) - 1).clamp(1, 32)
        return {"boundary": binary_cross_entropy_with_logits(logits, labels, pos_weight=rare)}


def _totals(x: Tensor, chunk: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """sqrt(n) times the mean of the n tokens of each chunk, (b, heads, U, d) of x (b, heads, n, d) with chunk (b, n)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = torch.ones_like(chunk, dtype=x.dtype) if valid is None else valid.to(x.dtype)
    x = x if valid is None else x.masked_fill(~valid[:, None, :, None], 0)
    at = chunk[:, None, :, None].expand_as(x)
    sums = x.new_zeros(*x.shape[:2], count, x.shape[-1]).scatter_add_(2, at, x)
    size = x.new_zeros(x.shape[0], count).scatter_add_(1, chunk, kept).clamp_min(1)
    return sums / size.sqrt()[:, None, :, None]


@torch.no_grad()
def split_labels(c: Context, window: int, gap: int) -> Tensor:
    """Where the attention of the `window` tokens before a key and of those after it falls apart, (b, S).

    The mean logit of pairs inside the two windows, less that from the right one to the left one, over all heads: a split
    is its peak among all less than `gap` away, if pairs inside weigh e times as much. Needs as many queries as keys.
    """
    if c.q.shape[2] != c.k.shape[2]:
        raise ValueError(f"split labels need as many queries as keys, got {c.q.shape[2]} and {c.k.shape[2]}")
    (q_left, q_right), (k_left, k_right) = (window_means(x, window, c.valid) for x in (c.q, c.k))
    k_left, k_right = (x.repeat_interleave(c.q.shape[1] // c.k.shape[1], 1) for x in (k_left, k_right))
    inside = (q_left * k_left).sum(-1) + (q_right * k_right).sum(-1)
    apart = (inside / 2 - (q_right * k_left).sum(-1)).mean(1) * c.q.shape[-1] ** -0.5
    if c.valid is not None:
        apart = apart.masked_fill(~c.valid, -torch.inf)
    return peaks(apart, gap) & (apart > 1) & (torch.arange(apart.shape[1], device=apart.device) > 0)
