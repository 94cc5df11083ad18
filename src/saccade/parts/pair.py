"""A mechanism bound to tensors: what needs the whole sequence is done once, tiles can then be asked for.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, d key size, e value size; Q x K one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saccade.mechanism.values import Pairwise
from saccade.parts.algebra import And, Full, Mask, Or, Pairs, Span, cover
from saccade.parts.base import Side, Sizes, Weight
from saccade.parts.score import grouped_matmul
from saccade.parts.select import Select
from saccade.parts.selection import Sampled, Selection
from saccade.parts.tokens import On, TokenMap


@dataclass(frozen=True)
class Context:
    """The tensors of one call, as parts see them.

    Query row r stands at position r + offset; `ends` (b,) are the key counts of a ragged batch, or None. In a ragged
    batch with as many queries as keys the padding is shared and row r stands at r; otherwise the L queries are the
    last L of each sample's keys, and `offset` is None. `tails` are the rows before the call's first that token maps look
    back to, (b, heads, past, d) by map and side.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offset: int | None = 0
    start: int = 0
    ends: Tensor | None = None
    mask: Tensor | None = None
    params: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    selection: Selection | None = None
    decoding: bool = False
    looks_back: bool = False
    tails: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.q.shape[1], self.k.shape[1], self.q.shape[-1], self.v.shape[-1])

    @property
    def i(self) -> Tensor:
        """Query positions, (b or 1, L)."""
        rows = torch.arange(self.q.shape[2], device=self.q.device)
        if self.offset is not None:
            return (rows + self.offset)[None]
        assert self.ends is not None
        return rows + (self.ends[:, None] - self.q.shape[2])

    @property
    def j(self) -> Tensor:
        """Key positions, (1, S)."""
        return torch.arange(self.start, self.start + self.k.shape[2], device=self.k.device)[None]

    @property
    def valid(self) -> Tensor | None:
        """Which keys are no padding, (b, S), or None when all are."""
        return (
            None
            if self.ends is None
            else torch.arange(self.k.shape[2], device=self.k.device) < self.ends[:, None]
        )

    @property
    def query_valid(self) -> Tensor | None:
        """Which queries are no padding, (b, L), or None when all are."""
        shared = self.ends is not None and self.offset is not None
        return self.valid if shared and self.q.shape[2] == self.k.shape[2] else None

    @property
    def key_ends(self) -> Tensor:
        """Key counts, (b or 1,)."""
        return torch.tensor([self.k.shape[2]], device=self.k.device) if self.ends is None else self.ends


def take_heads(c: Context, weights: Callable[[Sizes], dict[str, Weight]], heads: Sequence[int]) -> Context:
    """The context of some query heads, ascending, and of what belongs to them; `weights` declares the params.

    Key-value heads stay shared where every one of them is read by as many of the heads; otherwise each head gets its own.
    """
    total, groups = c.q.shape[1], c.k.shape[1]
    owners = [h * groups // total for h in heads]
    shared = list(dict.fromkeys(owners))
    even = len(heads) // len(shared)
    if owners == [g for g in shared for _ in range(even)]:
        owners = shared
    own = replace(c.sizes, heads=len(heads), kv_heads=len(owners))
    whole, cut = weights(c.sizes), weights(own)

    def of(x: Tensor, count: int) -> Tensor:
        """Of one entry for so many heads each, those of `heads`: as many as the heads, or one where they share it."""
        index = [h * x.shape[0] // total for h in heads]
        return pick(x, index if count == len(heads) else list(dict.fromkeys(index)), 0)

    return replace(
        c,
        q=pick(c.q, heads, 1),
        k=pick(c.k, owners, 1),
        v=pick(c.v, owners, 1),
        mask=c.mask if c.mask is None or c.mask.shape[1] == 1 else pick(c.mask, heads, 1),
        params={
            n: x if n not in whole or whole[n].shape == cut[n].shape else of(x, cut[n].shape[0])
            for n, x in c.params.items()
        },
        streams={n: pick(x, heads, 1) if x.shape[1] == total else x for n, x in c.streams.items()},
        buffers={
            n: of(x, len(heads) if x.shape[0] == total else len(owners))
            if x.shape[0] in (total, groups)
            else x
            for n, x in c.buffers.items()
        },
    )


def pick(x: Tensor, index: Sequence[int], dim: int) -> Tensor:
    """Entries of one dimension; a view when they stand side by side."""
    first = index[0]
    if list(index) == list(range(first, first + len(index))):
        return x.narrow(dim, first, len(index))
    return x.index_select(dim, torch.tensor(index, device=x.device))


def map_tokens(tokens: Sequence[TokenMap], c: Context, new_keys: int) -> Context:
    """Apply the token maps to q and to the last `new_keys` keys and values; earlier ones of a cache are mapped already.

    The result's `tails` are those that a later call goes on from.
    """
    if not tokens:
        return c
    if any(part.past for part in tokens):
        c = without_padding(c)  # a learned tap times NaN has no gradient
    first = c.k.shape[2] - new_keys
    x: dict[On, Tensor] = {"q": c.q, "k": c.k[:, :, first:], "v": c.v[:, :, first:]}
    keys, tails = c.j[:, first:], {}
    for part in tokens:
        for on in part.on:
            if part.past:
                name, rows = tail_name(part, on), x[on]
                before = c.tails.get(name, rows.new_zeros(*rows.shape[:2], part.past, rows.shape[3]))
                x[on] = torch.cat((before.to(rows.dtype), rows), 2)
                tails[name] = x[on][:, :, rows.shape[2] :]
            x[on] = part.map(x[on], c.i if on == "q" else keys, on, c)
    k, v = x["k"], x["v"]
    if first:
        k, v = torch.cat((c.k[:, :, :first], k), dim=2), torch.cat((c.v[:, :, :first], v), dim=2)
    return replace(c, q=x["q"], k=k, v=v, tails=tails)


def tail_name(part: TokenMap, on: On) -> str:
    """What a state calls the rows that a token map looks back to."""
    return f"{part.name}_{on}"


def without_padding(c: Context) -> Context:
    """Keys and values of padding set to zero, so that whatever they held cannot reach a result."""
    valid = c.valid
    if valid is None:
        return c
    gone = ~valid[:, None, :, None]
    return replace(c, k=c.k.masked_fill(gone, 0), v=c.v.masked_fill(gone, 0))


@dataclass(frozen=True)
class Tile:
    """Rows against keys, as `tile` methods see them: i (b or 1, 1, Q, 1), j (1, 1, 1, K).

    q and k are what the score prepared; `count` (b or 1, h or 1, Q, 1) is how many of the tile's keys each row may read,
    where a part asks for it; `streams` holds declared streams and the parts' extras, those of the query
    side cut to the rows, those of the key side to the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    j: Tensor
    rows: slice
    cols: Tensor
    streams: dict[str, Tensor]
    params: dict[str, Tensor]
    count: Tensor | None = None


@dataclass(frozen=True)
class Program:
    """A pairwise mechanism over a context whose tokens, summary and score are prepared."""

    mechanism: Pairwise
    context: Context
    q: Tensor
    k: Tensor
    v: Tensor
    selections: dict[Select, Selection]
    streams: dict[str, Tensor]
    sides: dict[str, Side]

    @classmethod
    def bind(cls, m: Pairwise, c: Context) -> Program:
        """Do the token-level work of `m`; `c.q` and `c.k` have gone through the token maps."""
        c = replace(without_padding(c), looks_back=m.causal)
        selections: dict[Select, Selection] = {}
        for leaf in m.pairs.leaves():
            if isinstance(leaf, Select):
                selections[leaf] = c.selection if c.selection is not None else leaf.choose(c)
        if m.summary is not None:
            k, v = m.summary.reduce(c.k, c.v, c.valid, c.params)
            c = replace(c, k=k, v=v, ends=None, offset=c.offset or 0)
        q, k = m.score.prepare(c)
        declared = m.streams(c.sizes) if c.streams else {}
        streams = {name: c.streams[name] for name in declared}
        sides: dict[str, Side] = {name: x.side for name, x in declared.items()}
        for part in m.makers:
            for name, (side, x) in part.extras(c).items():
                streams[name], sides[name] = x, side
        return cls(m, c, q, k, c.v, selections, streams, sides)

    @property
    def pairs(self) -> Pairs:
        return self.mechanism.pairs

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def spans(self, r0: int, r1: int) -> list[Span]:
        """Key index intervals that cover what rows [r0, r1) may read."""
        c = self.context
        if c.offset is None:
            return [(0, self.keys)]
        found = cover(self.pairs, r0 + c.offset, r1 + c.offset, c.start + self.keys)
        if found and self.mechanism.sweeps:  # a sweep passes every key up to the row's own
            found = [(found[0][0], max(found[-1][1], min(c.start + self.keys, r1 + c.offset)))]
        return [(max(0, lo - c.start), hi - c.start) for lo, hi in found if hi > c.start]

    def columns(self, spans: list[Span]) -> Tensor:
        """Key indices of the spans, ascending."""
        if not spans:
            return torch.empty(0, dtype=torch.long, device=self.q.device)
        return torch.cat([torch.arange(lo, hi, device=self.q.device) for lo, hi in spans])

    def tile(
        self,
        rows: slice,
        spans: list[Span],
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Tile:
        """The tile of `rows` and the keys of `spans`; q, k and v replace the prepared ones (whole, not sliced)."""
        c = self.context
        cols = self.columns(spans)
        q, k, v = (new if new is not None else old for new, old in ((q, self.q), (k, self.k), (v, self.v)))
        streams = {
            n: x[:, :, rows] if self.sides[n] == "q" else take(x, spans) for n, x in self.streams.items()
        }
        t = Tile(
            q[:, :, rows],
            take(k, spans),
            take(v, spans),
            c.i[:, None, rows, None],
            (cols + c.start)[None, None, None],
            rows,
            cols,
            streams,
            c.params,
        )
        asked = any(part.reach == "count" for part in self.mechanism.logits)
        return replace(t, count=self._count(t)) if asked else t

    def _count(self, t: Tile) -> Tensor:
        """How many keys of the tile each row may read; a mask of single pairs, which may split a row, does not count."""
        found = self._by_rule(t)
        every = t.i.new_full((1, 1, 1, 1), t.cols.numel())
        return (
            every if found is None else found.expand(*found.shape[:3], t.cols.numel()).sum(-1, keepdim=True)
        )

    def exist(self, t: Tile) -> Tensor | None:
        """Which pairs of the tile exist, broadcastable to (b, h, Q, K), or None when all do."""
        c = self.context
        found = self._by_rule(t)
        if c.mask is not None:
            mask = c.mask if c.mask.shape[-2] == 1 else c.mask[..., t.rows, :]
            mask = mask if mask.shape[-1] == 1 else mask.index_select(-1, t.cols)
            found = mask if found is None else found & mask
        return found

    def _by_rule(self, t: Tile) -> Tensor | None:
        """The pairs of the mechanism without those of padding."""
        found, ends = self._exist(self.pairs, t), self.context.ends
        if ends is None:
            return found
        kept = (t.cols < ends[:, None])[:, None, None]
        return kept if found is None else found & kept

    def _exist(self, pairs: Pairs, t: Tile) -> Tensor | None:
        if isinstance(pairs, Full):
            return None
        if isinstance(pairs, And | Or):
            out: Tensor | None = None
            for p in pairs.parts:
                term = self._exist(p, t)
                if term is None:
                    if isinstance(pairs, Or):
                        return None
                    continue
                out = term if out is None else (out & term if isinstance(pairs, And) else out | term)
            return out
        if isinstance(pairs, Mask):
            if not pairs.by_head:
                return pairs.exist(t.i, t.j)
            heads = self.q.shape[1]
            each = [pairs.at(h, heads).exist(t.i[:, 0], t.j[:, 0]) for h in range(heads)]  # type: ignore[attr-defined]
            return torch.stack(each, 1)
        assert isinstance(pairs, Select)
        return self.selections[pairs].exist(t.rows, t.j, t.cols)  # type: ignore[union-attr]

    def logits(self, t: Tile) -> Tensor:
        """Logits (b, h, Q, K), float32 or wider, -inf where no pair exists."""
        s = self.weighed(self._terms(t, len(self.mechanism.logits)), t)
        exist = self.exist(t)
        return s if exist is None else s.masked_fill(~exist, -torch.inf)

    def weighed(self, s: Tensor, t: Tile) -> Tensor:
        """Logits of a tile and what its pairs gain by standing for others that were not chosen."""
        for chosen in self.selections.values():
            if isinstance(chosen, Sampled):
                s = s + chosen.weigh(t.rows, t.cols).to(s.dtype)
        return s

    def _terms(self, t: Tile, count: int) -> Tensor:
        """The score of a tile after the first `count` logits parts."""
        if not count:
            wide = torch.promote_types(t.q.dtype, torch.float32)
            return self.mechanism.score.tile(replace(t, q=t.q.to(wide), k=t.k.to(wide)))
        part = self.mechanism.logits[count - 1]
        if part.reach != "halo":
            return part.tile(self._terms(t, count - 1), t)
        above, left, right = part.halo
        first, last = int(t.cols[0]), int(t.cols[-1]) + 1
        top, lo, hi = max(0, t.rows.start - above), max(0, first - left), min(self.keys, last + right)
        around = self.tile(slice(top, t.rows.stop), [(lo, hi)])
        s, exist = self._terms(around, count - 1), self.exist(around)
        s = s if exist is None else s.masked_fill(~exist, 0.0)
        sides = (left - (first - lo), right - (hi - last), above - (t.rows.start - top), 0)
        s = part.tile(torch.nn.functional.pad(s, sides), t)
        return s if last - first == t.cols.numel() else s.index_select(-1, t.cols - first)

    def weights(self, t: Tile) -> tuple[Tensor, Tensor | None]:
        """Weights of the tile's rows over its keys, which must be all that the rows may read, and the lse."""
        if not t.cols.numel():
            shape = t.q.shape[:3]
            wide = torch.promote_types(t.q.dtype, torch.float32)
            empty = torch.full(shape, -torch.inf, device=t.q.device, dtype=wide)
            return t.q.new_zeros((*shape, 0)), empty if self.mechanism.normalizer.has_lse else None
        w, lse = self.mechanism.normalizer.normalize(self.logits(t), t)
        for part in self.mechanism.reweight:
            w = part.tile(w, t)
        return w, lse

    def mix(self, w: Tensor, t: Tile) -> Tensor:
        """The weighted values of a tile, and what its pairs bring besides."""
        out = grouped_matmul(w, t.v.to(w.dtype))
        for part in self.mechanism.value if t.cols.numel() else ():
            out = out + part.tile(w, t)
        return out


def take(x: Tensor, spans: list[Span]) -> Tensor:
    """The rows of x (b, g, S, d) that the spans name; a view when there is one span."""
    if len(spans) == 1:
        return x[:, :, spans[0][0] : spans[0][1]]
    if not spans:
        return x[:, :, :0]
    return torch.cat([x[:, :, lo:hi] for lo, hi in spans], dim=2)
