"""A grouped softmax over the own block and the blocks that a query fetches; nothing else is read.

Legend: b batch, h query heads, M rows of a slab, T fetched blocks a row, B tokens of a block, the last its landmark.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops
from saccade.kernels.gather import once
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import split
from saccade.parts.landmark import GroupedSoftmax, StingyRope
from saccade.parts.mask import Causal, Chunk
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Program
from saccade.parts.select import TopBlocks
from saccade.parts.selection import Blocks

SLAB_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 27}


class FetchKernel(Kernel):
    """The own block and chosen blocks under `grouped_softmax`, a slab of rows at a time, without gradients."""

    name = "fetch"
    gradients = False
    lse = False

    def efficiency(self, r: Request) -> float:
        return 0.1 if r.device == "cpu" else 0.03

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise) or not isinstance(m.normalizer, GroupedSoftmax):
            return ["runs a grouped softmax"]
        why, size, form = [], m.normalizer.block, split(m.pairs)
        chosen = form[2][0] if form is not None and len(form[2]) == 1 else None
        if form is None or form[:2] != (Causal(), Chunk(size)) or not isinstance(chosen, TopBlocks):
            why.append(f"pairs are not causal & (top_blocks({size}, ...) | chunk({size}))")
        elif (chosen.size, chosen.height) != (size, 1):
            why.append(f"blocks of {chosen.size} keys for {chosen.height} queries meet groups of {size}")
        stingy = isinstance(m.score, StingyRope) and m.score.block == size
        if not m.score.factored and not stingy:
            why.append(f"the score {m.score} is not followed to fetched blocks")
        why += [f"{p.name} is not followed to fetched blocks" for p in (*m.logits, *m.reweight, *m.value)]
        if m.summary is not None or m.tiles is not None:
            why.append("knows neither summaries nor demanded tiles")
        for on, what in ((r.grad, "gradients"), (r.lse, "an lse"), (r.masked, "a mask of single pairs")):
            if on:
                why.append(f"has no {what}")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s, select = r.shape, _select(m)
        width = (select.keep.most(-(-s.keys // select.size)) + 1) * select.size
        stacks, read = s.batch * s.heads, m.score.pair_flops(s.head_dim) + 2 * s.value_dim
        numbers = width * (2 * s.head_dim + s.value_dim + 4)
        q, k, v, o = r.tensor_bytes()
        rows = min(s.length, _step(numbers * stacks, r.device))
        table = 3 * stacks * min(s.length, 1024) * -(-s.keys // select.size) * r.wide
        gathered = stacks * s.length * width * (s.head_dim + s.value_dim) * r.item
        prepared = (3 * (q + k) * r.wide) // r.item
        choices = 9 * stacks * s.length * select.keep.most(-(-s.keys // select.size))
        return Cost(
            preparation_flops(m, r) + stacks * s.length * width * read,
            q + k + v + o + gathered + table,
            choices + prepared + max(table, o + numbers * stacks * rows * r.wide),
            25 * -(-s.length // rows),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        select, program = _select(m), Program.bind(m, c)
        chosen = program.selections[select]
        assert isinstance(chosen, Blocks)
        width = (chosen.index.shape[-1] + 1) * chosen.size
        numbers = width * (program.q.shape[-1] + program.v.shape[-1] + 4) * c.q.shape[0] * c.q.shape[1]
        step = _step(numbers, r.device)
        outs = [
            _rows(program, chosen, slice(r0, min(program.rows, r0 + step)))
            for r0 in range(0, program.rows, step)
        ]
        return torch.cat(outs, 2).to(r.dtype), None


def _select(m: Pairwise) -> TopBlocks:
    (select,) = (p for p in m.pairs.leaves() if isinstance(p, TopBlocks))
    return select


def _step(numbers: int, device: str) -> int:
    return max(1, SLAB_NUMBERS["cpu" if device == "cpu" else "cuda"] // max(1, numbers))


def _rows(program: Program, chosen: Blocks, cut: slice) -> Tensor:
    """The output (b, h, M, e) of some rows, in float32 or wider."""
    c, size, keys = program.context, chosen.size, program.keys
    i = c.i[:, None, cut]
    own = torch.div(i, size, rounding_mode="floor")
    index, kept = once(chosen, cut)
    kept = kept & (index < own.unsqueeze(-1))
    unit = torch.cat((index, own.unsqueeze(-1).expand(*index.shape[:3], 1)), -1)
    read = torch.cat((kept, torch.ones_like(kept[..., :1])), -1)
    j = unit.unsqueeze(-1) * size + torch.arange(size, device=i.device)
    ends = c.key_ends[:, None, None, None, None]
    exist = read.unsqueeze(-1) & (j <= i[..., None, None]) & (j < ends)
    tokens = j.clamp(max=keys - 1).flatten(3)
    s = _score(program, cut, unit, _take(program.k, tokens).view(*j.shape, -1)).masked_fill(
        ~exist, -torch.inf
    )
    inside, _ = Softmax().normalize(s[..., :-1, :-1])
    whole = s[..., :-1, -1].masked_fill(~exist[..., :-1, :-1].any(-1), -torch.inf)
    near = s[..., -1, :].index_fill(-1, torch.tensor([size - 1], device=s.device), -torch.inf)
    w, _ = Softmax().normalize(torch.cat((whole, near), -1))
    far = torch.nn.functional.pad(w[..., :-size].unsqueeze(-1) * inside, (0, 1))
    w = torch.cat((far.flatten(-2), w[..., -size:]), -1)
    return (w.unsqueeze(-2) @ _take(program.v, tokens).to(w.dtype)).squeeze(-2)


def _score(program: Program, cut: slice, unit: Tensor, k: Tensor) -> Tensor:
    """Logits (b, h, M, T, B), float32 or wider, of rows and gathered keys (b, h, M, T, B, d) of the blocks `unit`."""
    score, q = program.mechanism.score, program.q[:, :, cut].unsqueeze(-2)
    wide = torch.promote_types(q.dtype, torch.float32)
    if isinstance(score, StingyRope):  # the half of q that a block does not meet is zero
        i = program.context.i[:, None, cut, None]
        near = score.is_near(i, unit * score.block).unsqueeze(-1)
        true, moved = q.chunk(2, -1)
        q = torch.cat((true * near, moved * ~near), -1)
    q = q.expand(*k.shape[:4], -1).to(wide)
    return (k.to(wide) @ q.unsqueeze(-1)).squeeze(-1)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Gathered rows (b, h, n, d) of x (b, g, S, d) at tokens (b, h, M, W), as (b, h, M, W, d)."""
    (b, g, keys, d), h = x.shape, tokens.shape[1]
    owner = torch.arange(b, device=x.device)[:, None] * g + torch.arange(h, device=x.device) // (h // g)
    flat = (owner[:, :, None, None] * keys + tokens.view(b, h, -1, tokens.shape[-1])).flatten()
    return x.reshape(-1, d)[flat].view(*tokens.shape, d)
