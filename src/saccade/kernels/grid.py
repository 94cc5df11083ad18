"""Neighbourhoods on grids and in shuffled order: a tile of cells against the keys that it can reach, many tiles at once.

Tiles whose masks look alike (all those in the middle, those along one border, ...) form a group, which runs as one batch
with one mask. A row meets all its keys in its own tile, so nothing is merged; backward recomputes each tile. (Hassani et
al., Faster Neighborhood Attention, 2024.)

Legend: b batch, h query heads, g key-value heads, T tiles of a group, Q cells and K keys of one tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.slab import bound_inputs, rebind
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.base import Side
from saccade.parts.grid import Axis, GridNeighborhood
from saccade.parts.mask import And, Causal, Pairs
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context, Program, Tile
from saccade.parts.pattern import Permuted

NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
SIDES = (1, 2, 4, 8, 16, 32, 64, 128)
PER_KEY, PER_TILE, SHUFFLED = 24, 512, 64


@dataclass(frozen=True)
class Strip:
    """Tiles of one axis that look alike: coordinates of their cells (T, Q) and keys (T, K), and who reads whom (Q, K)."""

    cells: Tensor
    keys: Tensor
    near: Tensor


@dataclass(frozen=True)
class Group:
    """Tiles of one size: cell numbers (T, Q) and (T, K), and who reads whom, (Q, K) or (T, Q, K); None where all do."""

    cells: Tensor
    keys: Tensor
    near: Tensor | None


@functools.lru_cache(maxsize=512)
def strips(axis: Axis, side: int) -> tuple[Strip, ...]:
    """The tiles of an axis, `side` cells of one class of dilation each, with the keys that they reach."""
    alike: dict[tuple[int, int, bytes], tuple[list[Tensor], list[Tensor], Tensor]] = {}
    for group in range(min(axis.dilation, axis.size)):
        count = int(axis.members(group))
        first, end = axis.bounds(torch.arange(count), count)
        for a in range(0, count, side):
            rows = slice(a, min(count, a + side))
            lo, hi = int(first[rows].min()), int(end[rows].max())
            keys = torch.arange(lo, hi)
            near = (keys >= first[rows, None]) & (keys < end[rows, None])
            cells = torch.arange(rows.start, rows.stop)
            found = alike.setdefault((len(cells), len(keys), near.numpy().tobytes()), ([], [], near))
            found[0].append(cells * axis.dilation + group)
            found[1].append(keys * axis.dilation + group)
    return tuple(Strip(torch.stack(c), torch.stack(k), near) for c, k, near in alike.values())


@functools.lru_cache(maxsize=32)
def groups(mask: GridNeighborhood, sides: tuple[int, ...], device: str) -> tuple[Group, ...]:
    """All tiles of a grid, group by group."""
    found = []
    for parts in itertools.product(*(strips(a, s) for a, s in zip(mask.axes, sides, strict=True))):
        cells, keys, near = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), None
        for axis, strip in zip(mask.axes, parts, strict=True):
            cells, keys = (
                (old[:, None, :, None] * axis.size + new[None, :, None]).flatten(0, 1).flatten(1)
                for old, new in ((cells, strip.cells), (keys, strip.keys))
            )
            both = strip.near if near is None else near[:, None, :, None] & strip.near[None, :, None]
            near = both if near is None else both.flatten(0, 1).flatten(1)
        assert near is not None
        found.append(Group(cells.to(device), keys.to(device), None if bool(near.all()) else near.to(device)))
    return tuple(found)


@functools.lru_cache(maxsize=32)
def shuffled_groups(mask: Permuted, causal: bool, tokens: int, device: str) -> tuple[Group, ...]:
    """Tiles of a shuffled order, `SHUFFLED` tokens each, by how many keys they reach."""
    place, at = mask.place(torch.arange(tokens)).sort()
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for a in range(0, tokens, SHUFFLED):
        rows = slice(a, min(tokens, a + SHUFFLED))
        ends = place[[a, rows.stop - 1]] + torch.tensor([-(mask.width // 2), mask.width // 2 + 1])
        lo, hi = torch.searchsorted(place, ends).tolist()
        alike.setdefault((rows.stop - a, hi - lo), []).append((at[rows], at[lo:hi]))
    found = []
    for tiles in alike.values():
        cells, keys = (torch.stack(x) for x in zip(*tiles, strict=True))
        near = mask.exist(cells.unsqueeze(2), keys.unsqueeze(1))
        near = near & (keys.unsqueeze(1) <= cells.unsqueeze(2)) if causal else near
        found.append(Group(cells.to(device), keys.to(device), near.to(device)))
    return tuple(found)


def tiling(pairs: Pairs, tokens: int, device: str) -> tuple[Group, ...] | None:
    """The tiles of an expression over whole self-attention, or None where it is none of those that fall into tiles."""
    if isinstance(pairs, GridNeighborhood):
        return groups(pairs, tile_sides(pairs), device)
    atoms = pairs.parts if isinstance(pairs, And) else (pairs,)
    shuffled = [p for p in atoms if isinstance(p, Permuted)]
    if len(shuffled) == 1 and all(p == Causal() for p in atoms if p is not shuffled[0]):
        return shuffled_groups(shuffled[0], len(atoms) > 1, tokens, device)
    return None


@functools.lru_cache(maxsize=1024)
def totals(axis: Axis, side: int) -> tuple[int, int, int]:
    """Pairs, keys and tiles of one axis, summed over its tiles."""
    found = [(s.cells.shape[0], s.cells.shape[1], s.keys.shape[1]) for s in strips(axis, side)]
    return sum(t * q * k for t, q, k in found), sum(t * k for t, _, k in found), sum(t for t, _, _ in found)


@functools.lru_cache(maxsize=256)
def tile_sides(mask: GridNeighborhood) -> tuple[int, ...]:
    """Cells of a tile along each axis: whole groups of a stride, as little wasted work as can be."""
    choices = []
    for axis in mask.axes:
        most = -(-axis.size // axis.dilation)
        choices.append(sorted({min(most, -(-n // axis.stride) * axis.stride) for n in SIDES}))

    def work(sides: tuple[int, ...]) -> int:
        pairs, keys, tiles = (math.prod(x) for x in zip(*map(totals, mask.axes, sides), strict=True))
        return pairs + PER_KEY * keys + PER_TILE * tiles

    return min(itertools.product(*choices), key=work)


def batches(group: Group, each: int, device: str) -> Iterator[Group]:
    """The tiles of a group, as many at once as leave their logits in cache; `each` is what one pair takes."""
    size = each * group.cells.shape[1] * group.keys.shape[1]
    step = max(1, NUMBERS["cpu" if device == "cpu" else "cuda"] // max(1, size))
    for a in range(0, group.cells.shape[0], step):
        cut = slice(a, a + step)
        near = group.near[cut] if group.near is not None and group.near.dim() == 3 else group.near
        yield Group(group.cells[cut], group.keys[cut], near)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (b, h, n, ...) for tiles (T, m), as (b T, h, m, ...)."""
    found = x.index_select(2, index.flatten()).unflatten(2, index.shape)
    return found.transpose(1, 2).flatten(0, 1)


def scatter(x: Tensor, batch: int) -> Tensor:
    """What `gather` made, (b T, h, m, ...), back as (b, h, T m, ...)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def side_of(program: Program, name: str) -> Side:
    """Whether an input belongs to the queries or to the keys."""
    return "q" if name == "q" else "k" if name in ("k", "v") else program.sides[name.removeprefix("stream.")]


def evaluate(
    program: Program, group: Group, inputs: dict[str, Tensor], lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out (b T, h, Q, e), lse)` of gathered inputs."""
    m, batch = program.mechanism, program.q.shape[0]
    wide = torch.promote_types(program.q.dtype, torch.float32)
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
    if type(m.normalizer) is Softmax:
        w, total = torch.softmax(s, -1), torch.logsumexp(s, -1) if lse else None
    else:
        w, total = m.normalizer.normalize(s, t)
    for reweight in m.reweight:
        w = reweight.tile(w, t)
    return program.mix(w, t), total


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
        batch = program.q.shape[0]
        for group in _parts(program, tiles):
            leaves = _leaves(program, group, tensors, set(wanted))
            with torch.enable_grad():
                out, total = evaluate(program, group, leaves, lse)
                outputs, weights = [out], [gather(grads[0], group.cells).to(out.dtype)]
                if total is not None and grads[1].numel():
                    outputs.append(total)
                    weights.append(gather(grads[1], group.cells).to(total.dtype))
                found = torch.autograd.grad(outputs, [leaves[n] for n in wanted], weights, allow_unused=True)
            for n, step in zip(wanted, found, strict=True):
                if step is None:
                    continue
                if n.startswith("param."):
                    sums[n] += step
                else:
                    index = (group.cells if side_of(program, n) == "q" else group.keys).flatten()
                    sums[n].index_add_(2, index, scatter(step, batch).to(sums[n].dtype))
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


def _leaves(
    program: Program, group: Group, tensors: dict[str, Tensor], wanted: set[str] | None = None
) -> dict[str, Tensor]:
    found = {}
    for n, x in tensors.items():
        if not n.startswith("param."):
            x = gather(x, group.cells if side_of(program, n) == "q" else group.keys)
        found[n] = x if wanted is None else x.detach().requires_grad_(n in wanted)
    return found


def run(program: Program, tiles: tuple[Group, ...], lse: bool) -> tuple[Tensor, Tensor | None]:
    """`(out (b, h, L, e), lse)` of a bound mechanism."""
    b, h, rows, _ = program.q.shape
    names, tensors = bound_inputs(program)
    inputs = dict(zip(names, tensors, strict=True))
    wide = torch.promote_types(program.q.dtype, torch.float32)
    out = torch.empty(b, h, rows, program.v.shape[-1], dtype=program.context.q.dtype, device=program.q.device)
    total: Tensor | None = None
    for group in _parts(program, tiles):
        found, part = evaluate(program, group, _leaves(program, group, inputs), lse)
        out.index_copy_(2, group.cells.flatten(), scatter(found, b).to(out.dtype))
        if lse and part is not None:
            total = out.new_empty((b, h, rows), dtype=wide) if total is None else total
            total.index_copy_(2, group.cells.flatten(), scatter(part, b).to(wide))
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
