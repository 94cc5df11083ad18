"""Block-sparse attention whose kept mass is put right, and whose skipped blocks come in as means: a mixer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.errors import MechanismError
from saccade.mechanism import Mixer, Pairwise, system
from saccade.parts.base import Part, Sizes, Weight, arg, check_argument
from saccade.parts.budget import Mass
from saccade.parts.mask import Sink
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, without_padding
from saccade.parts.proxy import block_mean
from saccade.parts.score import grouped_matmul
from saccade.parts.select import TopBlocks
from saccade.parts.selection import Blocks
from saccade.plan.choose import make
from saccade.plan.place import request

CHOICE = TopBlocks(64, Mass(0.9), rows=64)


@dataclass(frozen=True)
class Rectification(Blocks):
    """Chosen blocks, and which of the others are accepted as means, (b, h, N, U)."""

    accepted: Tensor | None = None


def spread(x: Tensor, means: Tensor, size: int, valid: Tensor | None) -> Tensor:
    """Mean absolute deviation (b, n, U, d) of x (b, n, S, d) from the means of its blocks."""
    return block_mean((x - means.repeat_interleave(size, 2)[:, :, : x.shape[2]]).abs(), size, valid)


@dataclass(frozen=True)
class Rectified(Mixer):
    """out = R sparse + sum_u P_u mean(v_u) over accepted blocks u, with P the proxy's mass of each block and R the rest of it.

    A block outside the choice is accepted where |q.k| of its means exceeds the estimated error of pooling, |dq.k| + |q.dk|
    with d the mean absolute deviation; what is neither read nor accepted leaves its mass to the blocks read. The first
    `text_keys` keys are always read, one by one.
    """

    choice: TopBlocks = CHOICE
    text_keys: int = arg(0, at_least=0)

    name = "rectified_spaattn"
    relative = "seerattention or moba"

    def __post_init__(self) -> None:
        check_argument(self.name, "text_keys", self.text_keys, int, {"at_least": 0})
        if not isinstance(self.choice, TopBlocks):
            raise MechanismError(f"{self.name}: choice must be a top_blocks(...), got {self.choice}")
        if self.text_keys % self.choice.block:
            raise MechanismError(
                f"{self.name}: text_keys must be whole blocks of {self.choice.block}, got {self.text_keys}"
            )

    __hash__ = Mixer.__hash__

    def parts(self) -> Iterator[Part]:
        yield self.choice
        yield self.choice.proxy

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return self.choice.proxy.weights(sizes)

    @property
    def sparse(self) -> Pairwise:
        """Attention inside what is read."""
        return Pairwise(pairs=self.choice | Sink(self.text_keys) if self.text_keys else self.choice)

    def _logits(self, c: Context) -> Tensor:
        """Log mass of blocks (b, h, N, U), -inf for those of text or padding."""
        size, rows = self.choice.block, self.choice.rows
        units = -(-c.k.shape[2] // size)
        s = self.choice.proxy.scores(self.choice.proxy.prepare(c, size, rows), slice(None), units)
        numbers = torch.arange(units, device=s.device)
        count = self._counts(c, units).to(s.dtype)
        s = s + count.clamp_min(1).log()[:, None, None]
        return s.masked_fill(((count == 0) | (numbers * size < self.text_keys))[:, None, None], -torch.inf)

    def _counts(self, c: Context, units: int) -> Tensor:
        """Keys of each block, (b or 1, U)."""
        first = torch.arange(units, device=c.k.device) * self.choice.block
        return (c.key_ends[:, None] - first).clamp(0, self.choice.block)

    def shares(self, c: Context) -> Tensor:
        """The estimated mass of each block of the whole row, text included: (b, h, N, U)."""
        s, text = self._logits(c), min(self.text_keys, c.k.shape[2])
        if text:
            q = block_mean(c.q, self.choice.rows, c.query_valid) * c.q.shape[-1] ** -0.5
            each = grouped_matmul(q, c.k[:, :, :text].to(q.dtype).transpose(-1, -2))
            there = torch.arange(text, device=s.device) < c.key_ends[:, None]
            s = torch.cat((each.masked_fill(~there[:, None, None], -torch.inf), s), -1)
        return Softmax().normalize(s)[0][..., text:]

    @torch.no_grad()
    def select(self, c: Context) -> Rectification:
        """What is read, and what is accepted as means; a selection that the call replays is kept."""
        if isinstance(c.selection, Rectification):
            return c.selection
        size, rows = self.choice.block, self.choice.rows
        if isinstance(c.selection, Blocks):
            index, valid = c.selection.index, c.selection.valid
        else:
            index, valid = self.choice.keep.keep(self._logits(c))
            most = int(valid.sum(-1).max()) if valid.numel() else 0
            order = valid.byte().argsort(dim=-1, descending=True, stable=True)[..., : max(1, most)]
            index, valid = index.gather(-1, order), valid.gather(-1, order)
        q, k = block_mean(c.q, rows, c.query_valid), block_mean(c.k, size, c.valid)
        dq, dk = spread(c.q, q, rows, c.query_valid), spread(c.k, k, size, c.valid)
        gain = grouped_matmul(q, k.mT).abs()
        error = grouped_matmul(dq, k.mT).abs() + grouped_matmul(q, dk.mT).abs()
        units = k.shape[2]
        numbers = torch.arange(units, device=q.device)
        there = (self._counts(c, units) > 0) & (numbers * size >= self.text_keys)
        accepted = (gain > error) & there[:, None, None] & ~self._read(index, valid, units)
        return Rectification(index, valid, size, rows, accepted)

    def _read(self, index: Tensor, valid: Tensor, units: int) -> Tensor:
        table = torch.zeros((*index.shape[:3], units), dtype=torch.uint8, device=index.device)
        return table.scatter_reduce_(-1, index, valid.byte(), "amax").bool()

    def _rows(self, x: Tensor, length: int) -> Tensor:
        """One row a query, of one a block of queries."""
        return x.repeat_interleave(self.choice.rows, 2)[:, :, :length]

    def mix(self, c: Context) -> Tensor:
        chosen = self.select(c)
        assert chosen.accepted is not None
        m = self.sparse
        out, _ = make(m, request(c, False)).run(replace(c, selection=chosen))
        taken = self.shares(c) * chosen.accepted
        pooled = grouped_matmul(taken, block_mean(c.v, self.choice.block, c.valid).to(taken.dtype))
        rest = 1 - taken.sum(-1, keepdim=True)
        n = c.q.shape[2]
        return self._rows(rest, n) * out.to(taken.dtype) + self._rows(pooled, n)

    def define(self, c: Context) -> Tensor:
        c = without_padding(c)
        chosen, size, keys = self.select(c), self.choice.block, c.k.shape[2]
        assert chosen.accepted is not None
        repeat, n = c.q.shape[1] // c.k.shape[1], c.q.shape[2]
        k, v = (x.repeat_interleave(repeat, 1) for x in (c.k, c.v))
        j = torch.arange(keys, device=k.device)
        read = chosen.exist(slice(0, n), j[None], j) | (j < self.text_keys)
        read = read & (j < c.key_ends[:, None])[:, None, None]
        s = (c.q @ k.mT / c.q.shape[-1] ** 0.5).masked_fill(~read, -torch.inf)
        taken = self.shares(c) * chosen.accepted
        rest = 1 - self._rows(taken.sum(-1, keepdim=True), n)
        each = taken / self._counts(c, taken.shape[-1]).clamp_min(1)[:, None, None]
        pooled = self._rows(each, n).repeat_interleave(size, -1)[..., :keys]
        pooled = pooled.masked_fill(~(j < c.key_ends[:, None])[:, None, None], 0)
        return (rest * Softmax().normalize(s)[0] + pooled) @ v

    def cost(self, r: Request) -> Cost:
        s, factor = r.shape, 3 if r.grad else 1
        groups, units = -(-s.length // self.choice.rows), -(-s.keys // self.choice.block)
        table = s.batch * s.heads * groups * units
        flops = 2 * table * (3 * s.head_dim + s.value_dim * factor)
        flops += 2 * s.batch * s.heads * groups * self.text_keys * s.head_dim * factor
        scored = table * self.choice.proxy.score_flops(s.head_dim, self.choice.block, self.choice.rows)
        q, k, v, o = r.tensor_bytes()
        wide = r.wide // r.item
        held = (2 * (q + k) + 2 * o) * wide + 6 * table * r.wide * factor
        own = Cost(flops + scored, 2 * (q + k) + v + 2 * o + 8 * table * r.wide, held, 60)
        return make(self.sparse, replace(r, lse=False)).cost + own


@system("rectified_spaattn", ref="S289")
def rectified_spaattn(choice: TopBlocks = CHOICE, text_keys: int = 0) -> Rectified:
    """Any choice of blocks, corrected: its output scaled by the mass that it stands for, other blocks as means where they are even.

    The first `text_keys` keys are no blocks, but read one by one. Bidirectional. (Liu et al., Rectified SpaAttn:
    Revisiting Attention Sparsity for Efficient Video Generation, 2025.)
    """
    return Rectified(choice, text_keys)
