"""Softmax over keys found by sorted hashes and over weighted samples, level by level; partial results merge by lse.

On a level, keys lie in hash order, so that a bucket is one block of them, and the queries of a bucket meet it in dense
tiles; the sampled keys of a run meet all queries of the run to its right. Backward recomputes each level.

Legend: b batch, h query heads, g key-value heads, n pairs of runs, R tokens of a run, m sampled keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from saccade.cost import Cost, Request
from saccade.kernels import block
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.chunk import softmax_only
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full, split
from saccade.parts.mask import Causal
from saccade.parts.normalizer import Partial, Softmax, merge
from saccade.parts.pair import Context, Program
from saccade.parts.selection import Blocks, Sampled
from saccade.parts.sortlsh import SortLSH


def _aligned(x: Tensor, front: int, run: int) -> Tensor:
    """x (b, h, L, ...) with `front` rows of zeros before it, cut into runs: (b, h, n, run, ...)."""
    back = -(front + x.shape[2]) % run
    return pad(x, (*(0, 0) * (x.dim() - 3), front, back)).unflatten(2, (-1, run))


def _softmax(s: Tensor, v: Tensor) -> Partial:
    w, lse = Softmax().normalize(s)
    return w @ v, lse


def own(q: Tensor, k: Tensor, v: Tensor, offset: int, run: int) -> Partial:
    """Each query against the keys of its own run up to itself."""
    length = q.shape[2]
    first = offset // run
    front = offset - first * run
    qs = _aligned(q, front, run)
    ks, vs = (_aligned(x[:, :, first * run :], 0, run)[:, :, : qs.shape[2]] for x in (k, v))
    later = torch.ones(run, run, dtype=torch.bool, device=q.device).triu(1)
    s = _grouped(qs, ks.transpose(-1, -2)).masked_fill(later, -math.inf)
    w, lse = Softmax().normalize(s)
    return tuple(x.flatten(2, 3)[:, :, front : front + length] for x in (_grouped(w, vs), lse))  # type: ignore[return-value]


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a (b, h, n, ., x) @ b (b, g, n, x, .), the heads of a group sharing b."""
    groups = b.shape[1]
    return (a.unflatten(1, (groups, -1)) @ b.unsqueeze(2)).flatten(1, 2)


def near(q: Tensor, k: Tensor, v: Tensor, chosen: Blocks, c: Context) -> Partial:
    """Each query against one block of sorted keys."""
    sparse = block.Sparse(
        chosen, Full(), None, c.i, c.offset, 0, c.ends if not c.looks_back else None, k.shape[2]
    )
    return block.attend(q, k, v, sparse)


def far(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Partial:
    """Runs of queries (b, h, n, R, d) against their sampled keys (b, h, n, m, d), with a bias (b, h, n, R, m)."""
    return _softmax(q @ k.transpose(-1, -2) + bias, v)


class HashKernel(Kernel):
    """Sorted hashes and samples, whole or by runs that halve."""

    name = "hash"

    def efficiency(self, r: Request) -> float:
        return 0.3 if r.device == "cpu" else 0.1

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if not isinstance(m, Pairwise):
            return why
        form = split(m.pairs)
        if form is None or form[1] is not None or len(form[2]) != 1 or not isinstance(form[2][0], SortLSH):
            why.append("pairs are not sorted hashes alone")
        elif form[0] not in (Full(), Causal()):
            why.append(f"the limit {form[0]} cuts buckets")
        if m.logits:
            why.append(f"the logits part {m.logits[0].name} is not followed into buckets")
        if m.summary is not None:
            why.append("summaries have no runs")
        if r.masked:
            why.append("a mask of single pairs is not followed into buckets")
        if r.ragged and r.shifted:
            why.append("the last queries of samples of unequal length begin in different runs")
        if m.tiles is not None:
            why.append("tiles were demanded, which sorted hashes set themselves")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        select = next(p for p in m.pairs.leaves() if isinstance(p, SortLSH))
        s, stacks = r.shape, r.shape.batch * r.shape.heads
        first, area, largest, runs = s.keys - s.length, 0, 0, 0
        if m.causal:
            count = -(-s.keys // select.base) - first // select.base
            area = largest = count * select.base**2
            for run in select.levels(s.keys):
                pairs = -(-s.keys // (2 * run)) - first // (2 * run)
                reading = sum((t // run) % 2 for t in range(first, s.keys))
                sampled = pairs * run * min(select.samples, run)
                area += sampled + reading * select.block
                largest, runs = max(largest, sampled), runs + 1
        else:
            sampled = s.length * min(select.samples, s.keys)
            area, largest, runs = sampled + s.length * min(select.block, s.keys), sampled, 1
        sizes = s.head_dim + s.value_dim
        flops = preparation_flops(m, r) + 2 * stacks * area * sizes
        if r.grad:
            flops += 6 * stacks * area * sizes
        q, k, v, o = r.tensor_bytes()
        moved = (q + k + v + o) * r.wide // r.item
        tables = stacks * (s.length + s.keys) * 40 * (runs + 1)
        peak = tables + 4 * stacks * largest * r.wide + 3 * moved + (weight_bytes(m, r) if r.grad else 0)
        return Cost(flops, moved * (runs + 2) * (3 if r.grad else 1) + tables, peak, 60 * (runs + 1))

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        c = program.context
        select, chosen = next(
            (p, x) for p, x in program.selections.items() if isinstance(p, SortLSH) and isinstance(x, Sampled)
        )
        wide = torch.promote_types(r.dtype, torch.float32)
        q, k, v = (x.to(wide) for x in (program.q, program.k, program.v))
        if c.query_valid is not None:
            q = q.masked_fill(~c.query_valid[:, None, :, None], 0)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

        def once(part: Callable[..., list[Partial]], *rest: object) -> list[Partial]:
            return checkpoint(part, q, k, v, *rest, use_reentrant=False) if grad else part(q, k, v, *rest)

        assert c.offset is not None
        if not c.looks_back:
            return _answer(once(_whole, chosen, select, c), r)
        offset = c.offset - c.start
        parts = once(lambda q, k, v: [own(q, k, v, offset, select.base)])
        for n, run in enumerate(select.levels(k.shape[2])):
            parts += once(_level, chosen, select, c, n + 1, run)
        return _answer(parts, r)


def _answer(parts: list[Partial], r: Request) -> tuple[Tensor, Tensor]:
    out, lse = merge(parts)
    return out.to(r.dtype), lse


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (b, g, n, S, d) at index (b, h, n, m): (b, h, n, m, d)."""
    x = x.repeat_interleave(index.shape[1] // x.shape[1], dim=1)
    return x.gather(3, index.unsqueeze(-1).expand(-1, -1, -1, -1, x.shape[-1]))


def _sampled(flags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the first `count` marked keys of flags (b, h, n, R), and which of them are marked."""
    order = flags.byte().argsort(dim=-1, descending=True, stable=True)[..., :count]
    return order, flags.gather(-1, order)


def _bias(q: Tensor, k: Tensor, marked: Tensor, weight: Tensor) -> Tensor:
    """Bias of sampled keys, (b, h, n, R, m), from buckets q (b, h, n, R) and k (b, h, n, m)."""
    outside = marked.unsqueeze(-2) & (q.unsqueeze(-1) != k.unsqueeze(-2))
    return weight.unsqueeze(-1).masked_fill(~outside, -math.inf)


def _whole(q: Tensor, k: Tensor, v: Tensor, chosen: Sampled, select: SortLSH, c: Context) -> list[Partial]:
    """One node: buckets of all keys in hash order, and samples of all keys."""
    b, h = q.shape[:2]
    q_bucket, k_bucket = chosen.q[:, :, 0], chosen.k[:, :, 0]
    order = k_bucket.argsort(dim=-1, stable=True).unsqueeze(2)
    blocks = Blocks(
        q_bucket.unsqueeze(-1),
        (q_bucket < -(-c.key_ends[:, None, None] // select.block)).unsqueeze(-1),
        select.block,
    )
    sorted_k, sorted_v = (_take(x.unsqueeze(2), order).squeeze(2) for x in (k, v))
    found = [near(q, sorted_k, sorted_v, blocks, c)]
    if select.samples:
        flags = chosen.sampled[:, :, 0].expand(b, h, -1).unsqueeze(2)
        index, marked = _sampled(flags, select.samples)
        bias = _bias(
            q_bucket.unsqueeze(2),
            k_bucket.unsqueeze(2).gather(-1, index),
            marked,
            chosen.log_weight[:, :, 0].to(q.dtype).unsqueeze(2),
        )
        out, lse = far(q.unsqueeze(2), _take(k.unsqueeze(2), index), _take(v.unsqueeze(2), index), bias)
        found.append((out.squeeze(2), lse.squeeze(2)))
    return found


def _level(
    q: Tensor, k: Tensor, v: Tensor, chosen: Sampled, select: SortLSH, c: Context, level: int, run: int
) -> list[Partial]:
    """Queries of right runs against the run to their left."""
    assert c.offset is not None
    b, h, length, _ = q.shape
    offset = c.offset - c.start
    first, two = offset // (2 * run), 2 * run
    front = offset - first * two
    q_bucket, k_bucket = chosen.q[:, :, level], chosen.k[:, :, level]
    right = (chosen.q_node[:, level] >= 0)[:, None].expand(b, h, -1)
    order = _aligned(k_bucket[:, :, first * two :], 0, two)[:, :, :, :run].argsort(dim=-1, stable=True)
    left_k, left_v = (_aligned(x[:, :, first * two :], 0, two)[:, :, :, :run] for x in (k, v))
    per_run = -(-run // select.block)
    local = (q_bucket // (2 * per_run) - first) * per_run + q_bucket % per_run
    blocks = Blocks(local.masked_fill(~right, 0).unsqueeze(-1), right.unsqueeze(-1), select.block)
    found = [near(q, _take(left_k, order).flatten(2, 3), _take(left_v, order).flatten(2, 3), blocks, c)]
    if select.samples:
        rows, buckets, weight = (
            _aligned(x, front, two)[:, :, :, run:]
            for x in (q, q_bucket, chosen.log_weight[:, :, level].to(q.dtype))
        )
        marks = chosen.sampled[:, :, level].expand(b, h, -1)[:, :, first * two :]
        index, marked = _sampled(_aligned(marks, 0, two)[:, :, :, :run], min(select.samples, run))
        theirs = _aligned(k_bucket[:, :, first * two :], 0, two)[:, :, :, :run].gather(-1, index)
        out, lse = far(
            rows, _take(left_k, index), _take(left_v, index), _bias(buckets, theirs, marked, weight)
        )
        out = pad(out, (0, 0, run, 0)).flatten(2, 3)[:, :, front : front + length]
        lse = pad(lse, (run, 0), value=-math.inf).flatten(2, 3)[:, :, front : front + length]
        found.append((out, lse.masked_fill(~right, -math.inf)))
    return found
