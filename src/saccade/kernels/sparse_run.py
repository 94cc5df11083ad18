"""Launches of the Triton kernels over tables of kept blocks, and the differentiable step made of them."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.kernels.table import BlockTable, Lists

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a tile, warps and pipeline stages of a program, whether the tensor copy engine loads tiles, and the
    most registers of a thread, where fewer let two programs share a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    copies: bool = False
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        own = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **own}


@functools.cache
def missing(device: str) -> str:
    """Why Triton's kernels do not run on a device; empty when they do."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if device == "cpu" and not interpreted():
        return "runs on CUDA; on a CPU only in Triton's interpreter, for tests"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return "needs a device of compute capability 8.0"
    return ""


@functools.cache
def interpreted() -> bool:
    """True when Triton runs its kernels as Python, on any device: its own variable says so before it is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime.interpreter import InterpretedFunction

    from saccade.kernels import sparse_triton

    return isinstance(sparse_triton.forward, InterpretedFunction)


@functools.cache
def copy_engine() -> bool:
    """True where tensor descriptors exist and the device has the engine."""
    found = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    return found and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def padded(size: int) -> int:
    """A head size as kernels hold it: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tiles(kind: str, x: Tensor, dim: int, narrow: bool = False) -> Launch:
    """The launch of a kernel for a dtype and the larger head size: a small fixed table, measured on an H100.

    `narrow` is for short lists, where two small programs that share a multiprocessor hide each other's beginning and end.
    """
    if not x.is_cuda:
        return Launch(64, 64, 4, 1)
    if x.dtype.itemsize > 2:
        return Launch(32, 32, 4, 1) if dim <= 64 else Launch(16, 16, 4, 1)
    if not copy_engine():
        return Launch(64, 64, 4, 2) if dim <= 128 else Launch(32, 32, 4, 1)
    if dim > 128:
        found = {
            "forward": Launch(128, 64, 8, 2),
            "queries": Launch(128, 32, 8, 2),
            "keys": Launch(32, 64, 8, 2),
        }
    elif dim > 64:
        found = {
            "forward": Launch(64, 64, 4, 3) if narrow else Launch(128, 64, 8, 2, registers=128),
            "queries": Launch(128, 64, 8, 3),
            "keys": Launch(64, 64, 4, 2),
        }
    else:
        found = {
            "forward": Launch(128, 64, 4, 3),
            "queries": Launch(64, 64, 4, 3),
            "keys": Launch(64, 64, 4, 3),
        }
    return replace(found[kind], copies=True)


def ready(x: Tensor) -> Tensor:
    """x, copied where its rows cannot be loaded 16 bytes at a time for no other reason than its strides."""
    even = all(s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1]) if n > 1)
    return x if x.stride(-1) == 1 and even else x.contiguous()


def aligned(*tensors: Tensor) -> bool:
    """True when every stride but the last is a multiple of 8 numbers."""
    return all(s % 8 == 0 for x in tensors for s in x.stride()[:-1])


def described(x: Tensor, rows: int, copies: bool) -> Any:
    """x (b, h, n, d) as the copy engine loads `rows` rows of it; x itself where it does not."""
    if not copies:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(x.shape[-1])])


def strides(*tensors: Tensor) -> list[int]:
    """The strides that kernels take, all but the last of each tensor."""
    return [s for x in tensors for s in x.stride()[:3]]


def table_arguments(table: BlockTable, found: Lists) -> tuple[list[Tensor], list[int]]:
    """The tensors and the sizes of a table that every kernel takes."""
    tile = found.tile if found.tile is not None else found.index
    bits = table.bits if table.bits is not None and table.bits.numel() else found.index

    def step(x: Tensor, dim: int) -> int:
        return x.stride(dim) if x.shape[dim] > 1 else 0

    index, count = found.index, found.count
    sizes = [
        step(index, 0),
        step(index, 1),
        index.shape[3],
        step(count, 0),
        step(count, 1),
        step(table.lo, 0),
    ]
    return [index, count, found.full, tile, bits, table.lo, table.hi], sizes


def wide(x: Tensor) -> Any:
    """The dtype that kernels add up in."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _fit(launch: Launch, table: BlockTable) -> Launch:
    """A launch whose tiles divide the blocks of a table; half the rows take half the warps."""
    fewer = (
        {"warps": launch.warps // 2, "registers": None}
        if table.rows < launch.rows and launch.warps > 4
        else {}
    )
    return replace(launch, rows=min(launch.rows, table.rows), keys=min(launch.keys, table.size), **fewer)  # type: ignore[arg-type]


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(out (b, h, L, E), lse (b, h, L)) over the pairs of a table."""
    from saccade.kernels import sparse_triton

    q, k, v = ready(q), ready(k), ready(v)
    b, h, rows, d = q.shape
    g, keys, e = k.shape[1], k.shape[2], v.shape[-1]
    narrow = table.rows < 128 or table.state.shape[1] > 1
    run = _fit(launch or tiles("forward", q, max(padded(d), padded(e)), narrow), table)
    out = torch.empty(b, h, rows, e, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, rows, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lists, sizes = table_arguments(table, table.by_query)
    sparse_triton.forward[(-(-rows // run.rows) * b * h,)](
        described(q, run.rows, run.copies), described(k, run.keys, run.copies), described(v, run.keys, run.copies),
        described(out, run.rows, run.copies), lse, *lists, scale * LOG2E,
        *strides(q, k, v), *sizes, h, g, rows, keys,
        ROWS=table.rows, SIZE=table.size, BM=run.rows, BN=run.keys, D=padded(d), DIM=d, E=padded(e), EDIM=e,
        BITS=table.bits is not None, TMA=run.copies, WIDE=wide(q), ALIGN=aligned(q, k, v),
        **run.options,
    )  # fmt: skip
    return out, lse


def row_products(out: Tensor, grad: Tensor, grad_lse: Tensor) -> Tensor:
    """sum(out grad) - grad_lse for every row, (b, h, L)."""
    from saccade.kernels import sparse_triton

    e = out.shape[-1]
    delta = torch.empty(grad_lse.shape, dtype=grad_lse.dtype, device=out.device)
    rows = 4096 // padded(e)
    sparse_triton.row_products[(-(-delta.numel() // rows),)](
        out, grad.contiguous(), grad_lse.contiguous(), delta, delta.numel(),
        BM=rows, E=padded(e), EDIM=e, WIDE=wide(out),
    )  # fmt: skip
    return delta


def backward(
    grad: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    table: BlockTable,
    scale: float,
    launches: tuple[Launch | None, Launch | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the lse of each row over all its keys and delta = sum(out grad) - grad_lse.

    Those of q go by query block and those of k and v by key block, every sum in its order. Adding up q's while k's and
    v's are made saves two of seven matrix products, but its atomic sums took 1.3 times as long on an H100.
    """
    from saccade.kernels import sparse_triton

    q, k, v, grad = ready(q), ready(k), ready(v), ready(grad)
    b, h, rows, d = q.shape
    g, keys, e = k.shape[1], k.shape[2], v.shape[-1]
    dim = max(padded(d), padded(e))
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse, delta = lse.contiguous(), delta.contiguous()
    run = _fit(launches[1] or tiles("keys", q, dim), table)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    steps = strides(q, k, v, grad)
    common = {
        "ROWS": table.rows, "SIZE": table.size, "D": padded(d), "DIM": d, "E": padded(e), "EDIM": e,
        "BITS": table.bits is not None, "WIDE": wide(q), "ALIGN": aligned(q, k, v, grad),
    }  # fmt: skip
    lists, sizes = table_arguments(table, table.by_key)
    sparse_triton.backward_keys[(-(-keys // run.keys) * b * g,)](
        described(q, run.rows, run.copies), described(k, run.keys, run.copies), described(v, run.keys, run.copies),
        described(grad, run.rows, run.copies), lse,
        delta, described(dk, run.keys, run.copies),
        described(dv, run.keys, run.copies), *lists, scale * LOG2E,
        *steps, *sizes, h, g, rows, keys,
        BM=run.rows, BN=run.keys, TMA=run.copies, **run.options, **common,
    )  # fmt: skip
    run = _fit(launches[0] or tiles("queries", q, dim), table)
    lists, sizes = table_arguments(table, table.by_query)
    sparse_triton.backward_queries[(-(-rows // run.rows) * b * h,)](
        described(q, run.rows, run.copies), described(k, run.keys, run.copies), described(v, run.keys, run.copies),
        described(grad, run.rows, run.copies), lse, delta, described(dq, run.rows, run.copies), *lists,
        scale * LOG2E, *steps, *sizes, h, g, rows, keys,
        BM=run.rows, BN=run.keys, TMA=run.copies, **run.options, **common,
    )  # fmt: skip
    return dq, dk, dv


def statistics(q: Tensor, k: Tensor, lse: Tensor, table: BlockTable, scale: float) -> tuple[Tensor, Tensor]:
    """(peak, mass), both (b, h, N, M): the largest weight and the sum of weights of every block, zeros where none is kept.

    What a gate over blocks is distilled from (Gao et al., SeerAttention, 2024), at one matrix product a kept block.
    """
    from saccade.kernels import sparse_triton

    q, k = ready(q), ready(k)
    b, h, rows, d = q.shape
    g, keys = k.shape[1], k.shape[2]
    found = table.by_query
    lists, sizes = table_arguments(table, found)
    n, m = table.state.shape[2:]
    peak, mass = (torch.zeros(b, h, n, m, dtype=lse.dtype, device=q.device) for _ in range(2))
    sparse_triton.statistics[(n * b * h,)](
        q, k, lse.contiguous(), peak, mass, *lists, scale * LOG2E, *strides(q, k, k), *sizes, h, g, rows, keys,
        ROWS=table.rows, SIZE=table.size, D=padded(d), DIM=d,
        BITS=table.bits is not None, WIDE=wide(q), num_warps=8, num_stages=1,
    )  # fmt: skip
    where = found.index.long().expand(b, h, n, m)
    listed = torch.arange(m, device=q.device) < found.count[..., None]
    return tuple(torch.zeros_like(x).scatter_add_(-1, where, x * listed) for x in (peak, mass))  # type: ignore[return-value]


class Attend(torch.autograd.Function):
    """Softmax over the pairs of a table as one differentiable step; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, table, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = (table, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = row_products(out, grads[0], grads[1])
        return (*backward(grads[0], delta, q, k, v, lse, *ctx.plan), None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) over the pairs of a table, differentiable where gradients are asked for.

    q (b, h, L, D), k (b, g, S, D), v (b, g, S, E) with g dividing h; rows without a key give zeros and lse -inf.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attend.apply(q, k, v, table, scale)
        return out, lse
    return forward(q, k, v, table, scale)
