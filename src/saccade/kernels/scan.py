"""Softmax of one constant query over every prefix of the keys: a scan of partial results (out, lse).

(Feng et al., Attention as an RNN, 2024.)  Legend: C keys of a chunk, n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.normalizer import Partial, Softmax, merge
from saccade.parts.pair import Context, Program

CHUNK = 64


def prefixes(s: Tensor, v: Tensor, carry: Partial | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """`(out (b, h, S, e), lse (b, h, S))` of every prefix, from logits s (b, h, S) and values v (b, h, S, e)."""
    b, h, keys = s.shape
    span = min(chunk, max(1, keys))
    count = -(-keys // span)
    s = pad(s, (0, count * span - keys), value=-torch.inf).view(b, h, count, span)
    v = pad(v, (0, 0, 0, count * span - keys)).view(b, h, count, span, -1)
    below = torch.ones(span, span, dtype=torch.bool, device=s.device).tril()
    w, lse = Softmax().normalize(s.unsqueeze(-2).expand(-1, -1, -1, span, -1).masked_fill(~below, -torch.inf))
    out = w @ v
    before = carry or (torch.zeros_like(out[:, :, 0, 0]), torch.full_like(lse[:, :, 0, 0], -torch.inf))
    starts = [before]
    for n in range(count - 1):
        starts.append(merge([starts[-1], (out[:, :, n, -1], lse[:, :, n, -1])]))
    old, old_lse = (torch.stack(x, 2).unsqueeze(3) for x in zip(*starts, strict=True))
    out, lse = merge([(out, lse), (old.expand_as(out), old_lse.expand_as(lse))])
    return out.flatten(2, 3)[:, :, :keys], lse.flatten(2, 3)[:, :, :keys]


class ScanKernel(Kernel):
    """One learned query a head; one answer a key."""

    name = "scan"

    def efficiency(self, r: Request) -> float:
        return 0.2

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        if not isinstance(m, Pairwise):
            return [f"runs pairwise mechanisms, this one is {m.family}"]
        why = []
        if m.heads is None or not m.heads.learned_query:
            why.append("the query is not constant over rows")
        rest = m.logits or m.reweight or m.value or m.summary
        if not m.score.factored or type(m.normalizer) is not Softmax or rest:
            why.append("the scan knows softmax over a factored score")
        if r.masked:
            why.append("a mask of single pairs has no prefix form; use key_lengths for padding")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        s = r.shape
        tokens = -(-s.keys // CHUNK) * CHUNK
        flops = 2 * s.batch * s.heads * (s.keys * s.head_dim + tokens * CHUNK * s.value_dim)
        _, k, v, _ = r.tensor_bytes()
        o = s.batch * s.heads * s.keys * s.value_dim * r.wide
        square = s.batch * s.heads * tokens * CHUNK * r.wide
        factor = 2 if r.grad else 1
        return Cost(
            flops * (3 if r.grad else 1),
            (k + v + o) * 3,
            3 * factor * square + 4 * o,
            40 + 10 * (tokens // CHUNK),
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        wide = torch.promote_types(r.dtype, torch.float32)
        out, lse = prefixes(*logits_and_values(program, wide))
        return out.to(r.dtype), lse


def logits_and_values(program: Program, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The constant query's logit of every key (b, h, S), and the values of every head (b, h, S, e)."""
    c = program.context
    b, h = program.q.shape[:2]
    g, keys = program.k.shape[1:3]
    q = program.q[:, :, :1].to(wide).reshape(b, g, h // g, -1)
    s = (q @ program.k.to(wide).transpose(-1, -2)).view(b, h, keys)
    if c.valid is not None:
        s = s.masked_fill(~c.valid[:, None], -torch.inf)
    v = program.v.to(wide)
    return s, v if g == h else v.unsqueeze(2).expand(-1, -1, h // g, -1, -1).reshape(b, h, keys, -1)
