"""Full causal attention of which the far part goes through summaries of regions.

Legend: b batch, h heads, n tokens, d key size, e value size, B tokens of a block, N blocks, R regions of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.mechanism import Mixer, system
from saccade.parts.base import Causality, arg
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context
from saccade.parts.state import State
from saccade.parts.tokens import On

Regions = tuple[Tensor, Tensor, Tensor]  # keys, values, and which exist
REGIONS = ("region_q", "region_k", "region_v")


def summed_up(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_j softmax(query.k_j / sqrt(d)) v_j of each region: query (..., R, d), k and v (..., R, size, .)."""
    s = (k @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(query.shape[-1])
    return (torch.softmax(s, -1).unsqueeze(-2) @ v).squeeze(-2)


@dataclass(frozen=True)
class Combiner(Mixer):
    """out_i = (sum_j in S_i exp(q_i.k_j) v_j + sum_R exp(q_i.k_R) v_R) / Z, all products over sqrt(d).

    S_i is the query's own block of `block` tokens up to itself. The regions R share out all tokens before that block; k_R
    and q_R are the largest keys and queries of a region, channel by channel, and v_R = sum_j in R softmax(q_R.k_j) v_j. So
    each earlier token has a share of its own, and all shares sum to one. Regions are, by `plan`: the blocks (`fixed`);
    runs of 1, 2, 4... blocks, aligned to their size (`logsparse`); the columns of the grid whose rows are the blocks
    (`axial`). (Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost, 2021.)
    """

    block: int = arg(64, at_least=1)
    plan: str = arg("fixed", choices=("fixed", "logsparse", "axial"))

    name = "combiner"

    __hash__ = Mixer.__hash__

    @property
    def causal(self) -> bool:
        return True

    @property
    def causality(self) -> Causality:
        return "safe"

    def causal_form(self) -> Combiner:
        return self

    def partition(self, i: int) -> tuple[range, list[range]]:
        """The direct tokens of position i, and the regions that share out the others before it."""
        at = i // self.block
        direct, first = range(at * self.block, i + 1), at * self.block
        if self.plan == "fixed":
            return direct, [range(r * self.block, (r + 1) * self.block) for r in range(at)]
        if self.plan == "axial":
            return direct, [range(c, first, self.block) for c in range(self.block if at else 0)]
        found = []
        while at:
            low = at & -at
            found.append(range((at - low) * self.block, at * self.block))
            at -= low
        return direct, found

    def levels(self, blocks: int) -> int:
        """How many sizes of runs the blocks of a text read."""
        return (blocks - 1).bit_length()

    def mix(self, c: Context) -> Tensor:
        self._check(c)
        b, h, n = c.q.shape[:3]
        blocks = -(-n // self.block)
        q, k, v = (
            pad(x, (0, 0, 0, blocks * self.block - n)).unflatten(2, (blocks, -1)) for x in self._wide(c)
        )
        at = torch.arange(self.block, device=q.device)
        own = (at <= at[:, None]).expand(1, blocks, -1, -1)
        ends = c.key_ends[:, None, None]
        if c.ends is not None:
            own = own & (
                torch.arange(blocks * self.block, device=q.device).view(-1, 1, self.block) < ends[..., None]
            )
        parts = [((q @ k.mT) / math.sqrt(q.shape[-1])).masked_fill(~own[:, None], -torch.inf)]
        keys, values, exist = self._regions(q, k, v, ends)
        if keys.shape[3]:
            rows = q.flatten(2, 3).unsqueeze(2) if keys.shape[2] == 1 else q
            far = (rows @ keys.mT).view(b, h, blocks, self.block, -1) / math.sqrt(q.shape[-1])
            parts.append(far.masked_fill(~exist[:, None, :, None], -torch.inf))
        w, _ = Softmax().normalize(torch.cat(parts, -1))
        out = w[..., : self.block] @ v
        if keys.shape[3]:
            far = w[..., self.block :]
            far = far.flatten(2, 3).unsqueeze(2) if keys.shape[2] == 1 else far
            out = out + (far @ values).view(out.shape)
        return out.flatten(2, 3)[:, :, :n]

    def _regions(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Regions:
        """Keys (b, h, N or 1, R, d) and values of the regions that each block reads, and which exist, (b or 1, N, R)."""
        blocks, device = q.shape[2], q.device
        at = torch.arange(blocks, device=device)[:, None]
        if blocks == 1:
            return k[:, :, :, :0], v[:, :, :, :0], at[None, :, :0] > 0
        if self.plan == "fixed":
            k, v, q = k[:, :, :-1], v[:, :, :-1], q[:, :, :-1]
            first = torch.arange(blocks - 1, device=device)
            exist = (first < at) & (first * self.block < ends)
            return k.amax(3).unsqueeze(2), summed_up(q.amax(3), k, v).unsqueeze(2), exist
        if self.plan == "axial":
            return self._columns(q, k, v, ends)
        keys, values, index, last = [], [], [], 0
        for level in range(self.levels(blocks)):
            count = (blocks - 1) >> level
            runs = [x[:, :, : count << level].unflatten(2, (count, -1)).flatten(3, 4) for x in (q, k, v)]
            keys.append(runs[1].amax(3))
            values.append(summed_up(runs[0].amax(3), *runs[1:]))
            index.append(((at >> level) - 1).clamp_min(0) + last)
            last += count
        exist = torch.cat([(at >> level) % 2 == 1 for level in range(len(keys))], 1)[None]
        chosen = torch.cat(index, 1)
        return torch.cat(keys, 2)[:, :, chosen], torch.cat(values, 2)[:, :, chosen], exist & (ends > 0)

    def _columns(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Regions:
        """The columns above each row of the grid."""
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # (b, h, B columns, N rows, .)
        tops = [pad(x.cummax(3).values[:, :, :, :-1], (0, 0, 1, 0)) for x in (q, k)]
        at = torch.arange(k.shape[3], device=k.device)
        above = at < at[:, None]
        s = (tops[0] @ k.mT / math.sqrt(k.shape[-1])).masked_fill(~above, -torch.inf)
        values = Softmax().normalize(s)[0] @ v
        exist = (at[:, None] > 0) & (torch.arange(self.block, device=k.device) < ends)
        return tops[1].transpose(2, 3), values.transpose(2, 3), exist

    def _wide(self, c: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of every head in float32 or wider, zeros where there is padding."""
        wide, repeat = torch.promote_types(c.q.dtype, torch.float32), c.q.shape[1] // c.k.shape[1]
        q, k, v = c.q.to(wide), *(x.to(wide).repeat_interleave(repeat, 1) for x in (c.k, c.v))
        if c.valid is not None:
            q, k, v = (x.masked_fill(~c.valid[:, None, :, None], 0) for x in (q, k, v))
        return q, k, v

    def _check(self, c: Context) -> None:
        if c.q.shape[2] != c.k.shape[2]:
            raise ValueError(
                f"{self} sums regions up by their queries, so every key brings one: got {c.q.shape[2]} queries and "
                f"{c.k.shape[2]} keys; go on from a state instead"
            )

    def define(self, c: Context) -> Tensor:
        self._check(c)
        q, k, v = self._wide(c)
        root = math.sqrt(q.shape[-1])
        samples = []
        for b, end in enumerate(c.key_ends.expand(q.shape[0]).tolist()):
            known: dict[range, tuple[Tensor, Tensor]] = {}
            rows = []
            for i in range(q.shape[2]):
                direct, regions = self.partition(i)
                logits = [(k[b, :, j] * q[b, :, i]).sum(-1) / root for j in direct if j < end]
                values = [v[b, :, j] for j in direct if j < end]
                for region in regions if i < end else ():
                    if region not in known:
                        own = k[b][:, region]
                        query = q[b][:, region].amax(1, keepdim=True)
                        p = torch.softmax((own * query).sum(-1) / root, -1)
                        known[region] = own.amax(1), (p.unsqueeze(-1) * v[b][:, region]).sum(1)
                    logits.append((known[region][0] * q[b, :, i]).sum(-1) / root)
                    values.append(known[region][1])
                if not logits:
                    rows.append(torch.zeros_like(v[b, :, 0]))
                    continue
                w = torch.softmax(torch.stack(logits, -1), -1)
                rows.append((w.unsqueeze(-1) * torch.stack(values, 1)).sum(1))
            samples.append(torch.stack(rows, 1))
        return torch.stack(samples)

    def fresh(
        self,
        batch: int,
        sizes: dict[On, tuple[int, int]],
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> State:
        h, (d, e) = sizes["q"][0], (sizes["k"][1], sizes["v"][1])
        wide = torch.promote_types(dtype, torch.float32)
        rows = {n: torch.empty(batch, x[0], 0, x[1], dtype=dtype, device=device) for n, x in sizes.items()}
        regions = {
            n: torch.empty(batch, h, 0, size, dtype=wide, device=device)
            for n, size in zip(REGIONS, (d, d, e), strict=True)
        }
        return State(rows | regions)

    def advance(self, c: Context, state: State) -> tuple[Tensor, State]:
        """Block by block. The state holds the queries of the block at hand, keys and values (`fixed`: of that block alone),
        and the regions that the block reads."""
        grown, start, size = state.appended(k=c.k, v=c.v), state.start, self.block
        k, v = grown.tensors["k"], grown.tensors["v"]
        q, base = torch.cat((state.tensors["q"], c.q), 2), state.length - state.tensors["q"].shape[2]
        regions = [state.tensors[n] for n in REGIONS]
        at, last, outs = state.length, grown.length, []
        while at < last:
            first = at // size * size
            stop = min(last, first + size)
            rows, block = slice(at - base, stop - base), slice(first - start, stop - start)
            near = self._wide(replace(c, q=q[:, :, rows], k=k[:, :, block], v=v[:, :, block]))
            outs.append(self._read(*near, regions[1], regions[2]))
            if stop == first + size:
                done = replace(
                    c, q=q[:, :, first - base : rows.stop], k=k[:, :, : block.stop], v=v[:, :, : block.stop]
                )
                regions = self._closed(done, regions, stop // size)
            at = stop
        first = last // size * size
        kept = {"q": q[:, :, first - base :].clone()} | dict(zip(REGIONS, regions, strict=True))
        if self.plan != "fixed":
            return torch.cat(outs, 2), replace(grown, tensors=kept | {"k": k, "v": v})
        kept |= {n: x[:, :, first - start :].clone() for n, x in (("k", k), ("v", v))}
        return torch.cat(outs, 2), State(kept, last, first)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The latest rows q of a block against its tokens so far and the regions before it."""
        s = q @ torch.cat((keys, k), 2).mT / math.sqrt(q.shape[-1])
        later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(
            s.shape[-1] - s.shape[-2] + 1
        )
        return torch.softmax(s.masked_fill(later, -torch.inf), -1) @ torch.cat((values, v), 2)

    def _closed(self, c: Context, regions: list[Tensor], blocks: int) -> list[Tensor]:
        """The regions that the next block reads, once `blocks` are complete; c.q holds the last of them."""
        if self.plan == "axial":
            q, k, v = self._wide(c)
            tops = [
                torch.maximum(old, x[:, :, -self.block :]) if old.shape[2] else x[:, :, -self.block :]
                for old, x in zip(regions, (q, k), strict=False)
            ]
            columns = [x.unflatten(2, (blocks, self.block)).transpose(2, 3) for x in (k, v)]
            return [*tops, summed_up(tops[0], *columns)]
        runs = blocks & -blocks if self.plan == "logsparse" else 1
        rows = slice(c.k.shape[2] - runs * self.block, None)
        q, k, v = self._wide(replace(c, k=c.k[:, :, rows], v=c.v[:, :, rows]))
        left = regions[0].shape[2] - (runs.bit_length() - 1)
        query = torch.cat((regions[0][:, :, left:], q), 2).amax(2, keepdim=True)
        found = (query, k.amax(2, keepdim=True), summed_up(query, k.unsqueeze(2), v.unsqueeze(2)))
        return [torch.cat((old[:, :, :left], new), 2) for old, new in zip(regions, found, strict=True)]

    def cost(self, r: Request) -> Cost:
        s = r.shape
        blocks = -(-s.length // self.block)
        both, rows = s.head_dim + s.value_dim, blocks * self.block
        levels, pairs, far = self.levels(blocks), 0, 0
        if blocks > 1 and self.plan == "fixed":
            pairs, far = (blocks - 1) * self.block, blocks - 1
        elif blocks > 1 and self.plan == "axial":
            pairs, far = self.block * blocks * blocks, self.block
        elif blocks > 1:
            pairs, far = sum(((blocks - 1) >> x << x) * self.block for x in range(levels)), levels
        stacks, factor = s.batch * s.heads, 3 if r.grad else 1
        flops = 2 * stacks * (pairs + rows * (self.block + far)) * both * factor
        logits = stacks * rows * (self.block + far) * r.wide
        inputs = stacks * rows * (2 * s.head_dim + 2 * s.value_dim) * r.wide
        summary = stacks * (pairs + (blocks if self.plan != "fixed" else 1) * far * both) * r.wide
        peak = inputs + 4 * logits + summary
        if r.grad:
            copied = levels * inputs * 3 // 10 if self.plan == "logsparse" else 0
            peak += inputs + 3 * summary + copied
        return Cost(flops, factor * (inputs + 4 * logits + 3 * summary), peak, (40 + 10 * levels) * factor)


@system("combiner", ref="S250")
def combiner(block: int = 64, plan: str = "fixed") -> Combiner:
    """The own block token by token, all before it through regions, in one softmax (Ren et al., Combiner, 2021)."""
    return Combiner(block, plan)
