"""Which pairs exist by content: a proxy scores units of keys, a budget says how many are kept.

Legend: b batch, h query heads, L queries, S keys, N blocks of queries, T choices a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.parts.algebra import Pairs, split
from saccade.parts.base import Causality, Sizes, Stream, arg
from saccade.parts.budget import Budget, budget
from saccade.parts.proxy import MeanKey, Proxy, last_positions
from saccade.parts.selection import Blocks, Selection, Spans

if TYPE_CHECKING:
    from saccade.parts.pair import Context


ROWS = 1024


class Select(Pairs):
    """A choice of pairs by content."""

    joins = "or"
    leaks: ClassVar[bool] = False

    def choose(self, c: Context) -> Selection:
        """The selection for the queries and keys of `c`."""
        raise NotImplementedError

    def flops(self, rows: int, keys: int, head_dim: int, looks_back: bool) -> int:
        """Matrix FLOPs of choosing for so many rows, the last ones of the keys, a head."""
        return 0


class Choice(Select):
    """Blocks of keys chosen for blocks of queries: proxy x granularity x budget. No gradient flows through it.

    Under a limit that looks back only what lies before is a candidate. Blocks of several queries choose by what all of
    these hold, so that the first of them sees the last: the choice `leaks`, and is meant for prefill.
    """

    own: ClassVar[bool] = (
        False  # whether the unit at the query itself is a candidate under a limit that looks back
    )
    proxy: Proxy

    @property
    def size(self) -> int:
        """Tokens of a unit of keys."""
        raise NotImplementedError

    @property
    def height(self) -> int:
        """Queries that share a choice."""
        return 1

    @property
    def keep(self) -> Budget:
        """How many units are kept."""
        raise NotImplementedError

    @property
    def causal(self) -> Causality:  # type: ignore[override]
        return "leak" if self.height > 1 else "safe"

    def candidates(self, end: int, keys: int) -> int:
        """Units that are candidates of some query before position `end`, under a limit that looks back."""
        return min(-(-keys // self.size), (end - 1) // self.size + self.own)

    def flops(self, rows: int, keys: int, head_dim: int, looks_back: bool) -> int:
        groups, scored = -(-rows // self.height), 0
        for n0 in range(0, groups, ROWS):
            n1 = min(groups, n0 + ROWS)
            end = keys - rows + min(rows, n1 * self.height)
            scored += (n1 - n0) * (self.candidates(end, keys) if looks_back else -(-keys // self.size))
        return scored * self.proxy.score_flops(head_dim, self.size, self.height)

    def open(self, c: Context, cut: slice) -> Tensor:
        """Which units are candidates of the blocks of queries in `cut`, (b or 1, 1, N or 1, U)."""
        numbers = torch.arange(-(-c.k.shape[2] // self.size), device=c.q.device)
        found = numbers * self.size < c.key_ends[:, None, None, None]
        if not c.looks_back:
            return found
        last = last_positions(c, self.height)[:, cut]
        end = torch.div(last, self.size, rounding_mode="floor") + self.own
        return found & (numbers < end[:, None, :, None])

    def losses(self, c: Context) -> dict[str, Tensor]:
        return self.proxy.lessons(c, self.size, self.height, self.open(c, slice(None)))

    @torch.no_grad()
    def choose(self, c: Context) -> Blocks:
        size, height = self.size, self.height
        ready = self.proxy.prepare(c, size, height)
        units, groups = -(-c.k.shape[2] // size), -(-c.q.shape[2] // height)
        choices = self.keep.most(units)
        shape = (*c.q.shape[:2], groups, choices)
        index = torch.zeros(shape, dtype=torch.long, device=c.q.device)
        valid = torch.zeros(shape, dtype=torch.bool, device=c.q.device)
        for n0 in range(0, groups, ROWS):
            cut = slice(n0, min(groups, n0 + ROWS))
            reach = units
            if c.looks_back and c.offset is not None:
                reach = min(units, (c.offset + min(c.q.shape[2], cut.stop * height) - 1) // size + self.own)
            if reach < 1:
                continue
            scores = self.proxy.scores(ready, cut, reach)
            scores = scores.masked_fill(~self.open(c, cut)[..., :reach], -torch.inf)
            found, kept = self.keep.keep(scores)
            index[:, :, cut, : found.shape[-1]] = found
            valid[:, :, cut, : found.shape[-1]] = kept
        return Blocks(index, valid, size, height)


def choice_of(pairs: Pairs) -> tuple[Pairs, Pairs | None, Choice] | None:
    """`limit & (allow | choice)` as (limit, allow, choice); None where the expression has another form."""
    form = split(pairs)
    if form is None or len(form[2]) != 1 or not isinstance(form[2][0], Choice):
        return None
    return form[0], form[1], form[2][0]


@dataclass(frozen=True)
class TopBlocks(Choice):
    """For every query and head, the blocks of `block` keys that the proxy scores highest.

    `top` is a count or a budget: top(n), share(part), mass(p), above(threshold). `rows` queries in a row may share
    a choice. Under a limit that looks back, only blocks before the query's own block are candidates; the own block is
    not chosen, so unite with `chunk(block)` to keep it. No gradient flows through the choice.
    """

    block: int = arg(64, at_least=1)
    top: int | Budget = arg(4, at_least=1)
    proxy: Proxy = MeanKey()
    rows: int = arg(1, at_least=1)

    name = "top_blocks"

    @property
    def size(self) -> int:
        return self.block

    @property
    def height(self) -> int:
        return self.rows

    @property
    def keep(self) -> Budget:
        return budget(self.top)


@dataclass(frozen=True)
class TopKeys(Choice):
    """For every query and head, the single keys that the proxy scores highest, the own one among the candidates.

    `top` is a count or a budget: top(n), share(part), mass(p), above(threshold). No gradient flows through the choice.
    """

    top: int | Budget = arg(32, at_least=1)
    proxy: Proxy = MeanKey()

    name = "top_keys"
    own = True

    @property
    def size(self) -> int:
        return 1

    @property
    def keep(self) -> Budget:
        return budget(self.top)


@dataclass(frozen=True)
class CentredSpan(Select):
    """Keys within `half` of a predicted centre (Luong et al., 2015: local attention).

    The stream `centre` (B, H, L) holds a key position for each query.
    """

    half: int = arg(8, at_least=0)

    name = "centred_span"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"centre": Stream("q", hidden=sizes.head_dim, positions=True)}

    @torch.no_grad()
    def choose(self, c: Context) -> Spans:
        centre = c.streams["centre"]
        return Spans(centre - self.half, centre + self.half)
