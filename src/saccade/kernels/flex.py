"""PyTorch's compiled FlexAttention, only where it passes a check on the spot for the class of shapes at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from saccade.cost import Cost, Request, Shape
from saccade.kernels.base import Kernel
from saccade.kernels.chunk import ChunkKernel, softmax_only, tile_area
from saccade.kernels.sparse_run import missing
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full, static_exist
from saccade.parts.logits import StaticBias
from saccade.parts.mask import Causal
from saccade.parts.pair import Context, Program

BLOCK = 128
SHORTEST = 2048


class FlexKernel(Kernel):
    """Any mask by position under softmax, compiled; forward and backward on CUDA, forward on a CPU."""

    name = "flex"
    counted = False
    lse = False
    deterministic = False

    def efficiency(self, r: Request) -> float:
        return 0.6 if r.device == "cuda" else 0.4

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if isinstance(m, Pairwise):
            if not m.static:
                why.append("pairs are chosen by content")
            if m.summary is not None or m.tiles is not None:
                why.append("knows neither summaries nor demanded tiles")
            if any(not isinstance(p, StaticBias) for p in m.logits):
                why.append(f"the logits part {m.logits[0].name} is not fixed by position")
        s = r.shape
        if r.device != "cuda":
            why.append(
                "on a CPU the first call of every shape waits tens of seconds for a compiler, and there is no backward"
            )
        if r.lse:
            why.append("lse is not asked of it here")
        if r.masked or r.ragged:
            why.append("a block mask would be rebuilt on every call")
        if r.dtype not in (torch.float16, torch.bfloat16):
            why.append(
                "for 16-bit inputs; in float32 it was seen to compile anew on every call, and it has no float64"
            )
        if r.shifted or s.length < SHORTEST:
            why.append(f"for self-attention over at least {SHORTEST:,} tokens, where it repays its compiler")
        if not all(d in (16, 32, 64, 128) for d in (s.head_dim, s.value_dim)):
            why.append("head sizes are 16, 32, 64 or 128")
        if isinstance(m, Pairwise) and not m.logits and m.pairs in (Full(), Causal()):
            why.append("sdpa runs the same without a compiler")
        elif isinstance(m, Pairwise) and not m.logits and r.device == "cuda" and not missing(r.device):
            why.append("sparse runs the same, and compiles nothing anew for another mask or length")
        if not why and isinstance(m, Pairwise):
            why += verified(m, r.dtype, r.grad, s.head_dim, s.value_dim, s.heads // s.kv_heads)
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        area, _, _ = tile_area(m.pairs, s.length, s.keys, BLOCK, BLOCK)
        per_pair = 2 * (s.head_dim + s.value_dim) + (2 * (3 * s.head_dim + 2 * s.value_dim) if r.grad else 0)
        q, k, v, o = r.tensor_bytes()
        stat = s.batch * s.heads * s.length * 4
        peak = o + stat + (q + k + v + o if r.grad else 0)
        return Cost(s.batch * s.heads * area * per_pair, (3 if r.grad else 1) * (q + k + v + o), peak, 3)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        program = Program.bind(m, c)
        s = r.shape
        mask = None if m.pairs == Full() else block_mask(m, s.length, s.keys, str(program.q.device))
        out = compiled()(
            program.q,
            program.k,
            program.v,
            score_mod=_score(m, s.heads),
            block_mask=mask,
            scale=1.0,
            enable_gqa=s.heads != s.kv_heads,
        )
        return out, None


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled once; new lengths reuse it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _score(m: Pairwise, heads: int) -> Callable[..., Tensor] | None:
    biases = [p for p in m.logits if isinstance(p, StaticBias)]
    if not biases:
        return None

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for p in biases:
            s = s + p.bias(i, j, heads)[h, 0, 0]
        return s

    return score_mod


@functools.lru_cache(maxsize=64)
def block_mask(m: Pairwise, rows: int, keys: int, device: str) -> object:
    """The block mask of a pair expression, built once a length."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return static_exist(m.pairs, i, j)

    return create_block_mask(mask_mod, None, None, rows, keys, device=device)


@functools.lru_cache(maxsize=256)
def verified(
    m: Pairwise, dtype: torch.dtype, grad: bool, head_dim: int, value_dim: int, group: int
) -> tuple[str, ...]:
    """Compare with the chunk kernel at 3 blocks and a bit, forward and backward; reasons when it fails.

    The budget is twice the error of a naive computation in the same precision, plus one rounding.
    """
    n = 3 * BLOCK + 40
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = Shape(1, 2 * group, n, head_dim, 2, n, value_dim)
    q, k, v = (
        torch.randn(1, h, n, d, device="cuda", generator=generator, dtype=torch.float32)
        .to(dtype)
        .requires_grad_(grad)
        for h, d in ((2 * group, head_dim), (2, head_dim), (2, value_dim))
    )
    weight = torch.randn(1, 2 * group, n, value_dim, device="cuda", generator=generator).to(dtype)

    def answers(kernel: Kernel, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(wide).requires_grad_(grad) for x in (q, k, v)]
        bound = Context(leaves[0], leaves[1], leaves[2])
        out, _ = kernel.run(m, bound, Request(shape, "cuda", wide, grad))
        if not grad:
            return [out.double()]
        return [
            out.double(),
            *(g.double() for g in torch.autograd.grad((out * weight.to(wide)).sum(), leaves)),
        ]

    try:
        got, truth, twin = (
            answers(FlexKernel(), dtype),
            answers(ChunkKernel(), torch.float64),
            answers(ChunkKernel(), dtype),
        )
    except Exception as error:  # a compiler may raise anything; the reason is shown in the plan
        return (f"fails on this class of shapes: {type(error).__name__}: {str(error).splitlines()[0][:120]}",)
    for name, a, t, n_ in zip(("out", "dq", "dk", "dv"), got, truth, twin, strict=False):
        budget = 2 * (n_ - t).abs().max() + torch.finfo(dtype).eps * t.abs().max() * 4
        off = (a - t).abs().max()
        if not bool(off <= budget) or math.isnan(float(off.detach())):
            return (
                f"{name} is off by {float(off.detach()):.2e} on this class of shapes, the budget is {float(budget):.2e}",
            )
    return ()
