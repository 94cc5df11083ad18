"""Triton kernels for a state that tokens overwrite: what each token really writes.

u_i = beta_i (v_i - k_i S_{i-1}) solves (1 + N) u = beta v inside a chunk, N the decayed products of keys below the diagonal. Its
inverse grows from blocks of one token to the whole chunk by halves, two matrix products each: no power of N is formed, so
equal keys lose nothing. Gradients of u solve the transposed system backward in time. (Yang et al., Parallelizing Linear
Transformers with the Delta Rule over Sequence Length, 2024; Gated Delta Networks, 2025.)

Legend: as in `state_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.kernels.channel_triton import halves
from saccade.kernels.state_triton import held, put, read, sums, tile, times


@triton.jit
def narrow(x, y, acc, LOW: tl.constexpr):
    """acc + x y, in tf32 where inputs are 16 bits wide."""
    if LOW:
        found = tl.dot(x, y, acc, input_precision="tf32")
    else:
        found = times(x, y, acc)
    return found


@triton.jit(do_not_specialize=["groups", "rows", "chunks"])
def prepare(
    K, V, Beta, Log, Ends, U, W, Y, Keep, k0, k1, k2, v0, v1, v2, n0, l0, l1, l2, groups, rows, chunks,
    C: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    DECAY: tl.constexpr, FIXED: tl.constexpr, BACK: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """U (b groups, rows, EDIM), W and Y (b groups, rows, DIM): a chunk writes u = U - W S into S, which becomes Keep S + Y^T u.

    Where BACK, V is the gradient of u and S runs from the end.
    """
    pid = tl.program_id(0)
    n = pid % chunks
    owner = pid // chunks
    b, g = owner // groups, owner % groups
    first = n * C
    i = tl.arange(0, C)
    at = first + i
    end = tl.load(Ends + b * n0)
    k = tile(K, b, g, first, 0, k0, k1, k2, end, C, D, DIM)
    beta = tl.load(Beta + owner.to(tl.int64) * rows + at, mask=at < end, other=0.0).to(WIDE)
    a = times(k, tl.trans(k), tl.zeros([C, C], WIDE)) * beta[:, None]
    into = tl.full([C], 1.0, WIDE)
    left = tl.full([C], 1.0, WIDE)
    keep = 1.0
    if DECAY == 1:
        G, last = sums(Log, b, g, first, l0, l1, l2, rows, C, FIXED, WIDE)
        a = a * tl.exp(tl.where(i[:, None] > i[None, :], G[:, None] - G[None, :], 0.0))
        into = tl.exp(G)
        left = tl.exp(last - G)
        keep = tl.exp(last)
        tl.store(Keep + owner.to(tl.int64) * chunks + n, keep)
    t = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(WIDE)
    for step in tl.range(0, STEPS, num_stages=1):
        late, _, pair = halves(1 << step, C)
        half = tl.where(pair & late[:, None], a, 0.0)
        t -= narrow(narrow(t, half, tl.zeros([C, C], WIDE), LOW), t, tl.zeros([C, C], WIDE), LOW)
    written = (k * (beta * into)[:, None]).to(k.dtype)
    kept = (k * left[:, None]).to(k.dtype)
    v = tile(V, b, g, first, 0, v0, v1, v2, rows if BACK else end, C, E, EDIM)
    if BACK:
        t = tl.trans(t).to(k.dtype)
        u = times(t, v, tl.zeros([C, E], WIDE))
        w = times(t, kept, tl.zeros([C, D], WIDE))
        put(Y, written, owner, first, 0, rows, C, D, DIM)
    else:
        t = t.to(k.dtype)
        u = times(t, (v * beta[:, None]).to(v.dtype), tl.zeros([C, E], WIDE))
        w = times(t, written, tl.zeros([C, D], WIDE))
        put(Y, kept, owner, first, 0, rows, C, D, DIM)
    put(U, u, owner, first, 0, rows, C, E, EDIM)
    put(W, w, owner, first, 0, rows, C, D, DIM)


@triton.jit(do_not_specialize=["rows", "chunks", "per", "segments"])
def solve(
    U, W, Y, Keep, First, S, Last, rows, chunks, per, segments,
    C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    DECAY: tl.constexpr, GIVEN: tl.constexpr, FINAL: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Turn U (heads, rows, EDIM) into what is written, in place; S (heads, segments, DIM, EDIM) gets the states that segments begin with.

    First is the state before, where GIVEN, and Last the one after, where FINAL; where BACK, chunks run from the last and S is not kept.
    """
    parts: tl.constexpr = (EDIM + E - 1) // E
    pid = tl.program_id(0)
    col = pid % parts * E
    head = pid // parts
    s = tl.zeros([D, E], WIDE)
    if GIVEN:
        where, box = held(First, head, 0, col, D, E, DIM, EDIM)
        s = tl.load(where, mask=box, other=0.0)
    none = head * 0
    for m in tl.range(0, chunks):
        n = chunks - 1 - m if BACK else m
        first = n * C
        if not BACK and n % per == 0:
            where, box = held(S, head * segments + n // per, 0, col, D, E, DIM, EDIM)
            tl.store(where, s, mask=box)
        w = tile(W, none, head, first, 0, 0, rows * DIM, DIM, rows, C, D, DIM)
        y = tile(Y, none, head, first, 0, 0, rows * DIM, DIM, rows, C, D, DIM)
        u = tile(U, none, head, first, col, 0, rows * EDIM, EDIM, rows, C, E, EDIM)
        u = (u - read(w, s, WIDE)).to(y.dtype)
        put(U, u, head, first, col, rows, C, E, EDIM)
        if DECAY == 1:
            s = s * tl.load(Keep + head.to(tl.int64) * chunks + n)
        s = times(tl.trans(y), u, s)
    if FINAL:
        where, box = held(Last, head, 0, col, D, E, DIM, EDIM)
        tl.store(where, s, mask=box)
