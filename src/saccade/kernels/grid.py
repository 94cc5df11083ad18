"""Neighbourhoods on grids and in shuffled order: a tile of cells against the keys that it can reach, many tiles at once.

A row meets all its keys in its own tile, so nothing is merged; backward recomputes each tile. (Hassani et
al., Faster Neighborhood Attention, 2024.)

Legend: b batch, h query heads, g key-value heads, T tiles of a group, Q cells and K keys of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.slab import bound_inputs, rebind
from saccade.kernels.tiles import Group, batches, tiling
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.base import Side
from saccade.parts.grid import GridNeighborhood
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Program, Tile


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (b, h, n, ...) for tiles (T, m), as (b T, h, m, ...)."""
    found = x.index_select(2, index.flatten()).unflatten(2, index.shape)
    return found.transpose(1, 2).flatten(0, 1)


def scatter(x: Tensor, batch: int) -> Tensor:
    """What `gather` made, (b T, h, m, ...), back as (b, h, T m, ...)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def flat(x: Tensor, index: Tensor, stacks: int) -> Tensor:
    """Tokens of x (b, h, n, d) for tiles (T, m), as (stacks T, r m, d): the r heads of a group become rows."""
    found = x.index_select(2, index.flatten())
    if x.shape[0] * x.shape[1] == stacks:
        return found.view(-1, index.shape[1], x.shape[-1])
    found = found.view(stacks, -1, *index.shape, x.shape[-1]).transpose(1, 2)
    return found.reshape(stacks * len(index), -1, x.shape[-1])


def unflat(x: Tensor, batch: int, heads: int, stacks: int, cells: int) -> Tensor:
    """What `flat` made, (stacks T, r m, ...), as (b, h, T m, ...); `cells` is m."""
    rest = x.shape[2:]
    if batch * heads != stacks:
        x = x.view(stacks, -1, batch * heads // stacks, cells, *rest).transpose(1, 2)
    return x.reshape(batch, heads, -1, *rest)


def plain(m: Pairwise) -> bool:
    """Whether a mechanism is softmax of dot products alone."""
    return m.score.factored and type(m.normalizer) is Softmax and not (m.logits or m.reweight)


def side_of(program: Program, name: str) -> Side:
    """Whether an input belongs to the queries or to the keys."""
    return "q" if name == "q" else "k" if name in ("k", "v") else program.sides[name.removeprefix("stream.")]


def evaluate(
    program: Program, group: Group, inputs: dict[str, Tensor], lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, T Q, e), lse)` of gathered inputs."""
    m, (batch, heads) = program.mechanism, program.q.shape[:2]
    wide = torch.promote_types(program.q.dtype, torch.float32)
    if plain(m):
        q, k, v = (inputs[n].to(wide) for n in "qkv")
        stacks, cells = batch * program.k.shape[1], group.cells.shape[1]
        s = _logits(q, k, group, stacks)
        found = [torch.bmm(torch.softmax(s, -1), v), *([torch.logsumexp(s, -1)] if lse else [])]
        found = [unflat(x, batch, heads, stacks, cells) for x in found]
        return found[0], found[1] if lse else None
    i, j = (x.repeat(batch, 1)[:, None] for x in (group.cells, group.keys))
    t = Tile(
        inputs["q"].to(wide),
        inputs["k"].to(wide),
        inputs["v"],
        i.unsqueeze(-1),
        j.unsqueeze(-2),
        slice(0, i.shape[-1]),
        group.keys[0],
        {n.removeprefix("stream."): x for n, x in inputs.items() if n.startswith("stream.")},
        {n.removeprefix("param."): x for n, x in inputs.items() if n.startswith("param.")},
    )
    s = m.score.tile(t)
    for part in m.logits:
        s = part.tile(s, t)
    if group.near is not None:
        near = group.near if group.near.dim() == 2 else group.near.repeat(batch, 1, 1)[:, None]
        s = s + torch.zeros((), dtype=s.dtype, device=s.device).where(near, -torch.inf)
    w, total = m.normalizer.normalize(s, t)
    for reweight in m.reweight:
        w = reweight.tile(w, t)
    return scatter(program.mix(w, t), batch), None if total is None or not lse else scatter(total, batch)


def _logits(q: Tensor, k: Tensor, group: Group, stacks: int) -> Tensor:
    """q k^T of plain tiles, (stacks T, r Q, K), with -inf where a cell does not read a key."""
    k, near = k.transpose(1, 2), group.near
    if near is None:
        return torch.bmm(q, k)
    repeat = q.shape[1] // near.shape[-2]
    near = near if repeat == 1 else near.repeat(*(1,) * (near.dim() - 2), repeat, 1)
    if near.dim() == 2:
        return torch.baddbmm(torch.zeros((), dtype=q.dtype, device=q.device).where(near, -torch.inf), q, k)
    s = torch.bmm(q, k)
    return torch.where(near, s.view(stacks, *near.shape), -torch.inf).view_as(s)


class Attend(torch.autograd.Function):
    """All tiles as one differentiable step in q, k, v, the parameters and the streams; saves these alone."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, tiles: tuple[Group, ...], lse: bool, names: list[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = (program, tiles, lse, names)
        ctx.save_for_backward(*tensors)
        out, total = run(rebind(program, names, tensors), tiles, lse)
        return out, out.new_empty(0) if total is None else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        program, tiles, lse, names = ctx.call
        tensors = dict(zip(names, ctx.saved_tensors, strict=True))
        wanted = [n for n, need in zip(names, ctx.needs_input_grad[4:], strict=True) if need]
        wide = torch.promote_types(program.q.dtype, torch.float32)
        sums = {
            n: torch.zeros_like(tensors[n], dtype=torch.promote_types(tensors[n].dtype, wide)) for n in wanted
        }
        for group in _parts(program, tiles):
            leaves = {
                n: x.detach().requires_grad_(n in wanted) for n, x in _taken(program, group, tensors).items()
            }
            cells = group.cells.flatten()
            with torch.enable_grad():
                out, total = evaluate(program, group, leaves, lse)
                outputs, weights = [out], [grads[0].index_select(2, cells).to(out.dtype)]
                if total is not None and grads[1].numel():
                    outputs.append(total)
                    weights.append(grads[1].index_select(2, cells).to(total.dtype))
                found = torch.autograd.grad(outputs, [leaves[n] for n in wanted], weights, allow_unused=True)
            for n, step in zip(wanted, found, strict=True):
                if step is not None and n.startswith("param."):
                    sums[n] += step
                elif step is not None:
                    index = (group.cells if side_of(program, n) == "q" else group.keys).flatten()
                    sums[n].index_add_(2, index, _given(program, group, n, step).to(sums[n].dtype))
        return (
            None,
            None,
            None,
            None,
            *(sums[n].to(x.dtype) if n in sums else None for n, x in tensors.items()),
        )


def _parts(program: Program, tiles: tuple[Group, ...]) -> Iterator[Group]:
    b, h = program.q.shape[:2]
    each = b * h * (1 + program.mechanism.score.temporaries(program.q.shape[-1]))
    for group in tiles:
        yield from batches(group, each, program.q.device.type)


def _taken(program: Program, group: Group, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the whole sequence for the tiles of a group."""
    found, stacks = {}, program.k.shape[0] * program.k.shape[1]
    for n, x in inputs.items():
        if not n.startswith("param."):
            index = group.cells if side_of(program, n) == "q" else group.keys
            x = flat(x, index, stacks) if plain(program.mechanism) else gather(x, index)
        found[n] = x
    return found


def _given(program: Program, group: Group, name: str, step: Tensor) -> Tensor:
    """The gradient of what `_taken` answered under a name, as (b, h, T m, ...)."""
    (batch, heads), owners = program.q.shape[:2], program.k.shape[1]
    if not plain(program.mechanism):
        return scatter(step, batch)
    if name == "q":
        return unflat(step, batch, heads, batch * owners, group.cells.shape[1])
    return unflat(step, batch, owners, batch * owners, group.keys.shape[1])


def run(program: Program, tiles: tuple[Group, ...], lse: bool) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, L, e), lse)` of a bound mechanism."""
    b, h, rows, _ = program.q.shape
    names, tensors = bound_inputs(program)
    inputs = dict(zip(names, tensors, strict=True))
    wide = torch.promote_types(program.q.dtype, torch.float32)
    out = torch.empty(b, h, rows, program.v.shape[-1], dtype=program.context.q.dtype, device=program.q.device)
    total: Tensor | None = None
    for group in _parts(program, tiles):
        found, part = evaluate(program, group, _taken(program, group, inputs), lse)
        out.index_copy_(2, group.cells.flatten(), found.to(out.dtype))
        if lse and part is not None:
            total = out.new_empty((b, h, rows), dtype=wide) if total is None else total
            total.index_copy_(2, group.cells.flatten(), part.to(wide))
    return out, total


class GridKernel(Kernel):
    """Neighbourhoods on grids and in shuffled order, at a cost that follows the window; any score and logits, gradients anywhere."""

    name = "grid"

    def efficiency(self, r: Request) -> float:
        return 0.4 if r.device == "cpu" else 0.1

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise):
            return [f"runs pairwise mechanisms, this one is {m.family}"]
        why = []
        cells = math.prod(m.pairs.grid or ()) if isinstance(m.pairs, GridNeighborhood) else r.shape.keys
        if r.shape.length != cells or r.shape.keys != cells or r.decoding:
            why.append(f"for all {cells} cells at once")
        elif tiling(m.pairs, cells, "cpu") is None:
            return [f"runs na(...) or permuted(...) alone, not {m.pairs}"]
        if r.masked or r.ragged:
            why.append("takes no mask and no padding beside the grid")
        if m.summary is not None or m.tiles is not None:
            why.append("knows neither summaries nor demanded tiles")
        if m.value:
            why.append(f"{m.value[0].name} mixes a term that every pair brings")
        if m.heads is not None and m.heads.learned_query:
            why.append("a learned query has its own prefix scan")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        tiles = tiling(m.pairs, s.keys, "cpu")
        assert tiles is not None
        area = sum(t.cells.numel() * t.keys.shape[1] for t in tiles)
        reached = sum(t.keys.numel() for t in tiles)
        stacks, temporaries = s.batch * s.heads, m.score.temporaries(s.head_dim)
        flops = stacks * area * (m.score.pair_flops(s.head_dim) + 2 * s.value_dim) * (4 if r.grad else 1)
        parts = [p for t in tiles for p in batches(t, stacks * (1 + temporaries), r.device)]
        sizes = {(p.cells.numel(), p.keys.numel(), p.cells.numel() * p.keys.shape[1]) for p in parts}
        q, k, v, o = r.tensor_bytes()
        per_cell = s.batch * s.heads * (s.head_dim + s.value_dim)
        per_key = s.batch * s.kv_heads * (s.head_dim + s.value_dim)
        steps = 3 + len(m.logits) + len(m.reweight) + len(m.value) + temporaries
        grown = 2 if r.grad else 1
        work = max(
            grown * (cells * per_cell + keys * per_key) + (steps + 2 * grown - 2) * stacks * pairs
            for cells, keys, pairs in sizes
        )
        traffic = (
            s.batch * (s.kv_heads * reached * (s.head_dim + s.value_dim) * r.item)
            + 4 * stacks * area * r.wide
        )
        peak = q + o + work * r.wide + (stacks * s.length * r.wide if r.lse else 0)
        if r.grad:
            peak += q + (q + k + v) * r.wide // r.item + 2 * weight_bytes(m, r)
        times = 4 if r.grad else 1
        return Cost(
            flops + preparation_flops(m, r), times * (q + k + v + o + traffic), peak, 20 * times * len(parts)
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        names, tensors = bound_inputs(program)
        tiles = tiling(m.pairs, r.shape.keys, str(c.q.device))
        assert tiles is not None
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            out, lse = Attend.apply(program, tiles, r.lse, names, *tensors)
            return out, lse if lse.numel() or not out.numel() else None
        return run(program, tiles, r.lse)
