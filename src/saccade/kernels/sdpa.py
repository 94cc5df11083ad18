"""PyTorch's scaled_dot_product_attention, with its backend chosen and named."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from saccade.cost import Cost, Request
from saccade.kernels.base import Kernel, preparation_flops, weight_bytes
from saccade.kernels.chunk import softmax_only
from saccade.mechanism.values import Mechanism, Pairwise
from saccade.parts.algebra import Full
from saccade.parts.mask import Causal
from saccade.parts.pair import Context, Program
from saccade.parts.score import Dot

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


FEW = 16


def backend(r: Request) -> str:
    """The backend that this request is run on: the fastest that accepts its shape class.

    On a CPU, flash takes every float dtype, and a dense mask; over fewer keys than a vector holds it answers zeros for
    a row of NaN, so math runs those. On CUDA, cuDNN and flash take 16-bit inputs with equal
    key and value sizes of at most 256 (cuDNN 128) and no dense mask; efficient takes float32 and masks.
    """
    s = r.shape
    same = s.head_dim == s.value_dim
    masked = r.masked or r.ragged or (r.shifted and s.length > 1)
    if r.device == "cpu":
        return "flash" if same and s.keys >= FEW and s.length else "math"
    if r.dtype in (torch.float16, torch.bfloat16) and same and not masked and s.head_dim % 8 == 0:
        if s.head_dim <= 128 and s.length > 1:
            return "cudnn"
        if s.head_dim <= 256:
            return "flash"
    return (
        "efficient"
        if r.dtype != torch.float64 and s.head_dim % 8 == 0 and s.value_dim % 8 == 0 and s.kv_heads == s.heads
        else "math"
    )


class SdpaKernel(Kernel):
    """Dot-product softmax over all keys or the causal prefix, and under a dense mask that the caller brought."""

    name = "sdpa"
    counted = False
    lse = False
    deterministic = False

    def efficiency(self, r: Request) -> float:
        chosen = backend(r)
        if r.device == "cpu":
            return 0.7 if chosen == "flash" else 0.2
        return {"cudnn": 1.0, "flash": 0.7, "efficient": 0.4, "math": 0.1}[chosen]

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        why = softmax_only(m)
        if isinstance(m, Pairwise):
            if m.pairs not in (Full(), Causal()):
                why.append(f"pairs {m.pairs} would need a dense length x length mask")
            if m.logits:
                why.append(f"the logits part {m.logits[0].name} would need a dense bias")
            if m.tiles is not None:
                why.append(f"tiles of {m.tiles.query} x {m.tiles.key} were demanded")
        if r.lse:
            why.append("gives no lse")
        return why

    def cost(self, m: Mechanism, r: Request) -> Cost:
        assert isinstance(m, Pairwise)
        s = r.shape
        keys = m.summary.rows(s.keys) if m.summary is not None else s.keys
        area = s.batch * s.heads * s.length * keys
        chosen = backend(r)
        flash = chosen in ("flash", "cudnn", "efficient")
        if m.causal and flash and not r.masked and not r.ragged:
            kept = (
                s.length * keys - s.length * (s.length - 1) // 2 if keys >= s.length else s.length * keys // 2
            )
            area = s.batch * s.heads * kept
        flops = 2 * area * (s.head_dim + s.value_dim) + preparation_flops(m, r)
        if r.grad:
            flops += 2 * area * ((3 if flash else 2) * s.head_dim + 2 * s.value_dim)
        q, k, v, o = r.tensor_bytes()
        mask = (
            s.length * s.keys * (s.batch if r.ragged else 1) * (1 + r.item)
            if r.masked or r.ragged or (r.shifted and s.length > 1)
            else 0
        )
        stat = s.batch * s.heads * s.length * 4
        prepared = q + (k + v if r.ragged else 0)
        prepared = 0 if isinstance(m.score, Dot) and m.summary is None and not r.ragged else prepared
        peak = prepared + o + mask + (stat if flash else 3 * area * r.wide)
        if r.device == "cpu" and flash:
            peak += _cpu_scratch(r)
        if r.grad:
            peak += q + k + v + weight_bytes(m, r) + (o if r.device == "cpu" and m.summary is None else 0)
        group = s.heads // s.kv_heads
        expanded = (k + v) * group if group > 1 and not flash else 0
        reads = group if r.device == "cpu" else 1
        return Cost(
            flops,
            (3 if r.grad else 1) * (q + reads * (k + v) + o) + mask + 2 * expanded,
            peak + expanded,
            3 if r.grad else 1,
        )

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        assert isinstance(m, Pairwise)
        if m.summary is None and c.ends is None and isinstance(m.score, Dot):
            q, k, v, scale = c.q, c.k, c.v, m.score.scale
        else:
            program = Program.bind(m, c)
            q, k, v, scale, c = program.q, program.k, program.v, 1.0, program.context
        rows, keys = q.shape[2], k.shape[2]
        plain = c.mask is None and c.ends is None
        causal = m.causal and rows > 1 and rows == keys and c.offset == 0 and plain
        mask = None if causal else self._mask(m, c, rows, keys)
        few = r.device == "cpu" and keys < FEW
        named = BACKENDS["math" if few else backend(r)]
        with sdpa_kernel([named]) if few or r.device != "cpu" else contextlib.nullcontext():
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        if mask is not None:
            out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
        return out, None

    def _mask(self, m: Pairwise, c: Context, rows: int, keys: int) -> Tensor | None:
        mask = c.mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:2], rows, keys)
        if m.causal and not (rows == 1 and c.offset is not None and c.offset + 1 == c.start + keys):
            below = c.j[:, None, None] <= c.i[:, None, :, None]
            mask = below if mask is None else mask & below
        if c.valid is not None:
            kept = c.valid[:, None, None]
            mask = kept.expand(-1, 1, rows, -1) if mask is None else mask & kept
        return mask


def _cpu_scratch(r: Request) -> int:
    """Working tiles of the CPU flash kernel: for each thread, scores, statistics and an accumulator of one block."""
    s = r.shape
    rows = 256 if s.length >= 768 else 64 if s.length >= 192 else 32
    return torch.get_num_threads() * 4 * (rows * 512 + 2 * rows + rows * s.value_dim)
