"""Triton kernels for decay by channel inside a chunk: pairs of tokens meet in halves, quarters, eighths and so on.

A later token i and an earlier token j of a chunk lie in the two halves of one block of 2s tokens for exactly one s = 1, 2, 4,
... With m the last token of the first half, exp(log_i - log_j) is exp(log_i - log_m) exp(log_m - log_j), neither above 1, and
one matrix product serves all pairs of that s: rows of x are queries in second halves and keys in first halves.

Legend: as in `state_triton`; PROGRAMS take chunks in turn, each with a scratch (C, D) for sums of logarithms that stays in cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.kernels.state_triton import put, tile, times


@triton.jit
def halves(s, C: tl.constexpr):
    """Which rows lie in second halves, the last row of each row's first half, and the pairs of both orders that meet there."""
    i = tl.arange(0, C)
    half = i // s
    late = half % 2 == 1
    return late, (half // 2 * 2 + 1) * s - 1, (half[:, None] ^ half[None, :]) == 1


@triton.jit
def summed(Scratch, log, C: tl.constexpr, D: tl.constexpr):
    """Logarithms summed from the start of a chunk, also written to the scratch of the program."""
    G = tl.cumsum(log, 0)
    tl.debug_barrier()
    tl.store(spot(Scratch, tl.arange(0, C), C, D), G)
    tl.debug_barrier()
    return G


@triton.jit
def spot(Scratch, i, C: tl.constexpr, D: tl.constexpr):
    """Where rows i of the scratch of this program stand."""
    return Scratch + (tl.program_id(0).to(tl.int64) * C + i[:, None]) * D + tl.arange(0, D)[None, :]


@triton.jit(do_not_specialize=["heads", "groups", "rows", "chunks", "total", "programs"])
def prepare(
    Q, K, Log, Ends, A, QD, KD, Keep, Fall, Scratch, q0, q1, q2, k0, k1, k2, l0, l1, l2, n0,
    heads, groups, rows, chunks, total, programs,
    C: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A (b heads, chunks, C, C), the decayed products of q and k; QD and KD, q decayed from the start and k to the end of the chunk.

    Keep and Fall (b groups, chunks, DIM): what survives the chunk, and its logarithm.
    """
    i = tl.arange(0, C)
    for t in tl.range(tl.program_id(0), total, programs, num_stages=1):
        n = t % chunks
        head = t // chunks
        b, h = head // heads, head % heads
        g = h // (heads // groups)
        owner = b * groups + g
        first = n * C
        end = tl.load(Ends + b * n0)
        a = tl.zeros([C, C], WIDE)
        own = tl.zeros([C], WIDE)
        for col in tl.range(0, DIM, D, num_stages=1):
            q = tile(Q, b, h, first, col, q0, q1, q2, rows, C, D, DIM)
            k = tile(K, b, g, first, col, k0, k1, k2, end, C, D, DIM)
            log = tile(Log, b, g, first, col, l0, l1, l2, rows, C, D, DIM).to(WIDE)
            G = summed(Scratch, log, C, D)
            fall = tl.sum(log, 0)
            put(QD, q * tl.exp(G), head, first, col, rows, C, D, DIM)
            if h % (heads // groups) == 0:
                put(KD, k * tl.exp(fall[None, :] - G), owner, first, col, rows, C, D, DIM)
                d = col + tl.arange(0, D)
                where = (owner.to(tl.int64) * chunks + n) * DIM + d
                tl.store(Fall + where, fall, mask=d < DIM)
                tl.store(Keep + where, tl.exp(fall), mask=d < DIM)
            own += tl.sum(q.to(WIDE) * k.to(WIDE), 1)
            for step in tl.range(0, STEPS, num_stages=1):
                late, middle, pair = halves(1 << step, C)
                share = tl.exp(-tl.abs(G - tl.load(spot(Scratch, middle, C, D))))
                x = (tl.where(late[:, None], q, k) * share).to(q.dtype)
                a += tl.where(pair & late[:, None], times(x, tl.trans(x), tl.zeros([C, C], WIDE)), 0.0)
        a = tl.where(i[:, None] == i[None, :], own[:, None], a)
        where = A + ((head.to(tl.int64) * chunks + n) * C + i[:, None]) * C + i[None, :]
        tl.store(where, a.to(A.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "groups", "rows", "chunks", "total", "programs"])
def finish(
    Q, K, V, Grad, Extra, Log, Ends, DQ, DK, Fell, Sum, Scratch,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2, l0, l1, l2, n0, heads, groups, rows, chunks, total, programs,
    C: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    RATIO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Complete DQ and DK (b heads, rows, DIM), which hold what comes through states, in place.

    Fell sums q dq - k dk from each token to the end of its chunk, Sum (b heads, chunks, DIM) over chunks.
    """
    i = tl.arange(0, C)
    for t in tl.range(tl.program_id(0), total, programs, num_stages=1):
        n = t % chunks
        head = t // chunks
        b, h = head // heads, head % heads
        g = h // (heads // groups)
        first = n * C
        end = tl.load(Ends + b * n0)
        v = tile(V, b, g, first, 0, v0, v1, v2, end, C, E, EDIM)
        grad = tile(Grad, b, h, first, 0, o0, o1, o2, rows, C, E, EDIM)
        below = times(grad, tl.trans(v), tl.zeros([C, C], WIDE))
        above = times(v, tl.trans(grad), tl.zeros([C, C], WIDE))
        own = tl.sum(grad.to(WIDE) * v.to(WIDE), 1)
        if RATIO:
            extra = tl.load(Extra + head.to(tl.int64) * rows + first + i, mask=first + i < rows, other=0.0)
            below += extra[:, None]
            above += extra[None, :]
            own += extra
        both = tl.where(i[:, None] > i[None, :], below, above).to(v.dtype)
        inside = (first + i < end)[:, None]
        for col in tl.range(0, DIM, D, num_stages=1):
            q = tile(Q, b, h, first, col, q0, q1, q2, rows, C, D, DIM)
            k = tile(K, b, g, first, col, k0, k1, k2, end, C, D, DIM)
            log = tile(Log, b, g, first, col, l0, l1, l2, rows, C, D, DIM).to(WIDE)
            G = summed(Scratch, log, C, D)
            h0 = heads.to(tl.int64) * rows * DIM
            dq = tile(DQ, b, h, first, col, h0, rows * DIM, DIM, rows, C, D, DIM).to(WIDE)
            dk = tile(DK, b, h, first, col, h0, rows * DIM, DIM, rows, C, D, DIM).to(WIDE)
            dq = dq * tl.exp(G) + own[:, None] * k
            dk = dk * tl.exp(tl.sum(log, 0)[None, :] - G) + own[:, None] * q
            for step in tl.range(0, STEPS, num_stages=1):
                late, middle, pair = halves(1 << step, C)
                share = tl.exp(-tl.abs(G - tl.load(spot(Scratch, middle, C, D))))
                x = (tl.where(late[:, None], q, k) * share).to(q.dtype)
                met = tl.where(pair, both, 0.0).to(v.dtype)
                dx = times(met, x, tl.zeros([C, D], WIDE)) * share
                dq += tl.where(late[:, None], dx, 0.0)
                dk += tl.where(late[:, None], 0.0, dx)
            dk = tl.where(inside, dk, 0.0)
            fell = q * dq - k * dk
            sums = tl.sum(fell, 0)
            d = col + tl.arange(0, D)
            tl.store(Sum + (head.to(tl.int64) * chunks + n) * DIM + d, sums, mask=d < DIM)
            put(Fell, sums[None, :] - tl.cumsum(fell, 0) + fell, head, first, col, rows, C, D, DIM)
            put(DQ, dq, head, first, col, rows, C, D, DIM)
            put(DK, dk, head, first, col, rows, C, D, DIM)


@triton.jit(do_not_specialize=["rows", "chunks"])
def add_later(Fell, Later, rows, chunks, C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """Add to Fell (heads, rows, DIM) what Later (heads, chunks, DIM) holds for its chunk."""
    n = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks
    at = n * C + tl.arange(0, C)
    d = tl.arange(0, D)
    where = Fell + (head.to(tl.int64) * rows + at[:, None]) * DIM + d[None, :]
    box = (at < rows)[:, None] & (d < DIM)[None, :]
    later = tl.load(Later + (head.to(tl.int64) * chunks + n) * DIM + d, mask=d < DIM, other=0.0)
    tl.store(where, tl.load(where, mask=box, other=0.0) + later[None, :], mask=box)
