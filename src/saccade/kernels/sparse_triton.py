"""Triton kernels over a table of kept blocks: forward, backward, block statistics and one-row decoding.

Whole blocks run without mask work; partial ones are cut by a key interval for each row, and by bits where one interval
does not say it. Softmax is in base 2: logits times `scale`, which holds log2(e). A table is read in the order of its
lists, so that nothing is compiled anew for another length, mask or table. (Dao et al., FlashAttention-2, 2023.)

Legend: BM query rows and BN keys of a tile, ROWS and SIZE those of a table's block, D and E padded head sizes; axes are
batch b, query head h, key-value head g.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SIZES = [
    "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "t0", "t1", "width", "c0", "c1", "i0",
    "heads", "groups", "rows", "keys",
]  # fmt: skip


@triton.jit
def read(
    x,
    b,
    h,
    first,
    s0,
    s1,
    s2,
    end,
    N: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows [first, first + N) of x (b, h, end, DIM), zeros beyond."""
    if TMA:
        tile = x.load([b, h, first, 0]).reshape(N, D)
    else:
        at = first + tl.arange(0, N)
        d = tl.arange(0, D)
        base = x + b.to(tl.int64) * s0 + h.to(tl.int64) * s1 + first.to(tl.int64) * s2
        where = base + tl.arange(0, N)[:, None] * s2 + d[None, :]
        if EDGE:
            if DIM == D:
                tile = tl.load(where, mask=(at < end)[:, None], other=0.0)
            else:
                tile = tl.load(where, mask=(at < end)[:, None] & (d < DIM)[None, :], other=0.0)
        elif DIM == D:
            tile = tl.load(where)
        else:
            tile = tl.load(where, mask=(d < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def write(
    x, value, b, h, first, heads, end, N: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr
):
    """Store rows [first, first + N) of contiguous x (b, heads, end, DIM)."""
    if TMA:
        x.store([b, h, first, 0], value.to(x.dtype).reshape(1, 1, N, D))
    else:
        at = first + tl.arange(0, N)
        d = tl.arange(0, D)
        base = x + ((b.to(tl.int64) * heads + h) * end + first) * DIM
        where = base + tl.arange(0, N)[:, None] * DIM + d[None, :]
        tl.store(where, value.to(x.dtype.element_ty), mask=(at < end)[:, None] & (d < DIM)[None, :])


@triton.jit
def cut(Bits, tile, row, lo, hi, key, col, ROWS: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Which pairs of a tile exist: rows `row` and columns `col` inside their block, key positions `key`."""
    keep = (key >= lo) & (key < hi)
    if BITS:
        words: tl.constexpr = (SIZE + 31) // 32
        word = tl.load(Bits + (tile.to(tl.int64) * ROWS + row) * words + col // 32)
        keep = keep & (((word >> (col % 32)) & 1) != 0)
    return keep


@triton.jit
def fold(s, v, top, total, acc, scale):
    """One step of the online softmax over the logits of a tile of keys: (row maxima, sums, values)."""
    risen = tl.maximum(top, tl.max(s, 1) * scale)
    base = tl.where(risen == float("-inf"), 0.0, risen)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=acc.dtype)
    return risen, total, acc


@triton.jit(do_not_specialize=SIZES)
def forward(
    Q, K, V, Out, Lse, Index, Count, Full, Tile, Bits, Lo, Hi, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, t0, t1, width, c0, c1, i0, heads, groups, rows, keys,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    BITS: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Out (b, h, L, E) and Lse (b, h, L): one program for BM rows of a head, over the list of their block."""
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
    tiles = (rows + BM - 1) // BM
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BM
    head = pid // tiles
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    n = first // ROWS
    i = first + tl.arange(0, BM)
    row = (first % ROWS + tl.arange(0, BM))[:, None]
    q = read(Q, b, h, first, q0, q1, q2, rows, BM, D, DIM, True, TMA)
    listed = b * t0 + h * t1 + n.to(tl.int64) * width
    counted = b * c0 + h * c1 + n
    whole = tl.load(Full + counted) * (SIZE // BN)
    last = tl.load(Count + counted) * (SIZE // BN)
    top = tl.full([BM], float("-inf"), WIDE)
    total = tl.zeros([BM], WIDE)
    acc = tl.zeros([BM, E], WIDE)
    lo = tl.load(Lo + b * i0 + i, mask=i < rows, other=0)
    hi = tl.load(Hi + b * i0 + i, mask=i < rows, other=0)
    soon = tl.load(Index + listed)
    for t in tl.range(0, last):
        at = tl.multiple_of(soon * SIZE + t % (SIZE // BN) * BN, BN)
        soon = tl.load(Index + listed + tl.minimum((t + 1) // (SIZE // BN), width - 1))
        k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, TMA)
        v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
        if t >= whole:
            col = t % (SIZE // BN) * BN + tl.arange(0, BN)
            tile = tl.load(Tile + listed + t // (SIZE // BN)) if BITS else 0
            key = at + tl.arange(0, BN)
            keep = cut(
                Bits, tile, row, lo[:, None], hi[:, None], key[None, :], col[None, :], ROWS, SIZE, BITS
            )
            s = tl.where(keep, s, float("-inf"))
        top, total, acc = fold(s, v, top, total, acc, scale)
    some = total > 0
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    write(Out, acc / tl.where(some, total, 1.0)[:, None], b, h, first, heads, rows, BM, E, EDIM, TMA)
    tl.store(Lse + head.to(tl.int64) * rows + i, lse, mask=i < rows)


@triton.jit(do_not_specialize=["rows"])
def row_products(
    Out, Grad, GradLse, Delta, rows, BM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr, WIDE: tl.constexpr
):
    """Delta (rows,): the sum of out times its gradient, minus the gradient of lse; all contiguous."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, E)
    mask = (i < rows)[:, None] & (e < EDIM)[None, :]
    where = i[:, None] * EDIM + e[None, :]
    out = tl.load(Out + where, mask=mask, other=0.0).to(WIDE)
    grad = tl.load(Grad + where, mask=mask, other=0.0).to(WIDE)
    less = tl.load(GradLse + i, mask=i < rows, other=0.0)
    tl.store(Delta + i, tl.sum(out * grad, 1) - less, mask=i < rows)


@triton.jit
def stats(Lse, Delta, base, i, kept):
    """lse in base 2 (inf where there is no key, so that weights are 0) and delta of rows i of a head, where kept."""
    lse = tl.load(Lse + base + i, mask=kept, other=float("-inf"))
    delta = tl.load(Delta + base + i, mask=kept, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def row_stats(Lse, Delta, base, first, end, N: tl.constexpr):
    """The same of rows [first, first + N) before `end`."""
    i = first + tl.arange(0, N)
    return stats(Lse, Delta, base, i, i < end)


@triton.jit(do_not_specialize=[*SIZES, "g0", "g1", "g2"])
def backward_queries(
    Q, K, V, Grad, Lse, Delta, DQ, Index, Count, Full, Tile, Bits, Lo, Hi, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, t0, t1, width, c0, c1, i0, heads, groups, rows, keys,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    BITS: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """DQ (b, h, L, D): one program for BM rows of a head, over the list of their block."""
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
        g0, g1, g2 = g0 // 8 * 8, g1 // 8 * 8, g2 // 8 * 8
    tiles = (rows + BM - 1) // BM
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BM
    head = pid // tiles
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    n = first // ROWS
    i = first + tl.arange(0, BM)
    row = (first % ROWS + tl.arange(0, BM))[:, None]
    q = read(Q, b, h, first, q0, q1, q2, rows, BM, D, DIM, True, TMA)
    grad = read(Grad, b, h, first, g0, g1, g2, rows, BM, E, EDIM, True, TMA)
    lse, delta = row_stats(Lse, Delta, head.to(tl.int64) * rows, first, rows, BM)
    listed = b * t0 + h * t1 + n.to(tl.int64) * width
    counted = b * c0 + h * c1 + n
    whole = tl.load(Full + counted) * (SIZE // BN)
    last = tl.load(Count + counted) * (SIZE // BN)
    acc = tl.zeros([BM, D], WIDE)
    lo = tl.load(Lo + b * i0 + i, mask=i < rows, other=0)
    hi = tl.load(Hi + b * i0 + i, mask=i < rows, other=0)
    soon = tl.load(Index + listed)
    for t in tl.range(0, last):
        at = tl.multiple_of(soon * SIZE + t % (SIZE // BN) * BN, BN)
        soon = tl.load(Index + listed + tl.minimum((t + 1) // (SIZE // BN), width - 1))
        k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, TMA)
        v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
        if t >= whole:
            col = t % (SIZE // BN) * BN + tl.arange(0, BN)
            tile = tl.load(Tile + listed + t // (SIZE // BN)) if BITS else 0
            key = at + tl.arange(0, BN)
            keep = cut(
                Bits, tile, row, lo[:, None], hi[:, None], key[None, :], col[None, :], ROWS, SIZE, BITS
            )
            s = tl.where(keep, s, float("-inf"))
        p = tl.exp2(s * scale - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=WIDE)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee", out_dtype=WIDE)
    write(DQ, acc * (scale * LN2), b, h, first, heads, rows, BM, D, DIM, TMA)


@triton.jit(do_not_specialize=[*SIZES, "g0", "g1", "g2"])
def backward_keys(
    Q, K, V, Grad, Lse, Delta, DK, DV, Index, Count, Full, Tile, Bits, Lo, Hi, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, t0, t1, width, c0, c1, i0, heads, groups, rows, keys,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    BITS: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """DK and DV (b, g, S, .) for BN keys of a key-value head, over the transposed lists of its query heads."""
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
        g0, g1, g2 = g0 // 8 * 8, g1 // 8 * 8, g2 // 8 * 8
    tiles = (keys + BN - 1) // BN
    pid = tl.program_id(0)
    first = pid % tiles * BN
    head = pid // tiles
    b, g = head // groups, head % groups
    m = first // SIZE
    key = (first + tl.arange(0, BN))[:, None]
    col = (first % SIZE + tl.arange(0, BN))[:, None]
    k = read(K, b, g, first, k0, k1, k2, keys, BN, D, DIM, True, TMA)
    v = read(V, b, g, first, v0, v1, v2, keys, BN, E, EDIM, True, TMA)
    dk = tl.zeros([BN, D], WIDE)
    dv = tl.zeros([BN, E], WIDE)
    for r in range(heads // groups):
        h = g * (heads // groups) + r
        base = (b * heads + h).to(tl.int64) * rows
        listed = b * t0 + h * t1 + m.to(tl.int64) * width
        counted = b * c0 + h * c1 + m
        whole = tl.load(Full + counted) * (ROWS // BM)
        last = tl.load(Count + counted) * (ROWS // BM)
        soon = tl.load(Index + listed)
        lse, delta = row_stats(Lse, Delta, base, soon * ROWS, rows, BM)
        for t in tl.range(0, last):
            at = tl.multiple_of(soon * ROWS + t % (ROWS // BM) * BM, BM)
            soon = tl.load(Index + listed + tl.minimum((t + 1) // (ROWS // BM), width - 1))
            q = read(Q, b, h, at, q0, q1, q2, rows, BM, D, DIM, True, TMA)
            grad = read(Grad, b, h, at, g0, g1, g2, rows, BM, E, EDIM, True, TMA)
            s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=WIDE)
            if t >= whole:
                row = t % (ROWS // BM) * BM + tl.arange(0, BM)
                i = at + tl.arange(0, BM)
                tile = tl.load(Tile + listed + t // (ROWS // BM)) if BITS else 0
                lo = tl.load(Lo + b * i0 + i, mask=i < rows, other=0)
                hi = tl.load(Hi + b * i0 + i, mask=i < rows, other=0)
                keep = cut(Bits, tile, row[None, :], lo[None, :], hi[None, :], key, col, ROWS, SIZE, BITS)
                s = tl.where(keep, s, float("-inf"))
            p = tl.exp2(s * scale - lse[None, :])
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee", out_dtype=WIDE)
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee", out_dtype=WIDE)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=WIDE)
            lse, delta = row_stats(Lse, Delta, base, soon * ROWS + (t + 1) % (ROWS // BM) * BM, rows, BM)
    write(DK, dk * (scale * LN2), b, g, first, groups, keys, BN, D, DIM, TMA)
    write(DV, dv, b, g, first, groups, keys, BN, E, EDIM, TMA)


@triton.jit(do_not_specialize=SIZES)
def statistics(
    Q, K, Lse, Peak, Mass, Index, Count, Full, Tile, Bits, Lo, Hi, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, t0, t1, width, c0, c1, i0, heads, groups, rows, keys,
    ROWS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Peak and Mass (b, h, N, T): the largest weight and the sum of weights in each listed block, given the lse."""
    blocks = (rows + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    n = pid % blocks
    head = pid // blocks
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    first = n * ROWS
    i = first + tl.arange(0, ROWS)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    q = read(Q, b, h, first, q0, q1, q2, rows, ROWS, D, DIM, True, False)
    lse = tl.load(Lse + head.to(tl.int64) * rows + i, mask=i < rows, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    lo = tl.load(Lo + b * i0 + i, mask=i < rows, other=0)[:, None]
    hi = tl.load(Hi + b * i0 + i, mask=i < rows, other=0)[:, None]
    listed = b * t0 + h * t1 + n.to(tl.int64) * width
    whole = tl.load(Full + b * c0 + h * c1 + n)
    for t in range(tl.load(Count + b * c0 + h * c1 + n)):
        at = tl.load(Index + listed + t) * SIZE
        k = read(K, b, g, at, k0, k1, k2, keys, SIZE, D, DIM, True, False)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
        p = tl.exp2(s * scale - lse[:, None])
        if t >= whole:
            tile = tl.load(Tile + listed + t) if BITS else 0
            p = tl.where(cut(Bits, tile, row, lo, hi, at + col, col, ROWS, SIZE, BITS), p, 0.0)
        where = (head.to(tl.int64) * blocks + n) * width + t
        tl.store(Peak + where, tl.max(tl.max(p, 1), 0))
        tl.store(Mass + where, tl.sum(tl.sum(p, 1), 0))


@triton.jit(do_not_specialize=[*SIZES, "parts", "each"])
def decode(
    Q, K, V, Parts, Levels, Index, Count, Full, Tile, Bits, Lo, Hi, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, t0, t1, width, c0, c1, i0, heads, groups, rows, keys, parts, each,
    SIZE: tl.constexpr, BN: tl.constexpr, TOGETHER: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Parts (b, h, L, parts, E) and Levels (b, h, L, parts) of a table whose blocks are single rows.

    A program takes `each` entries of a list, for one query head, or TOGETHER for all heads of a group that share lists.
    """
    pid = tl.program_id(0)
    part = pid % parts
    n = pid // parts % rows
    span = heads // groups if TOGETHER else 1
    stack = pid // (parts * rows)
    b, h = stack // (heads // span), stack % (heads // span) * span
    g = h // (heads // groups)
    r = tl.arange(0, 16)
    d = tl.arange(0, D)
    where = Q + b.to(tl.int64) * q0 + (h + r)[:, None].to(tl.int64) * q1 + n.to(tl.int64) * q2 + d[None, :]
    q = tl.load(where, mask=(r < span)[:, None] & (d < DIM)[None, :], other=0.0)
    listed = b * t0 + h * t1 + n.to(tl.int64) * width
    whole = tl.load(Full + b * c0 + h * c1 + n)
    last = tl.minimum(tl.load(Count + b * c0 + h * c1 + n), (part + 1) * each)
    steps: tl.constexpr = (SIZE + BN - 1) // BN
    lo, hi = tl.load(Lo + b * i0 + n), tl.load(Hi + b * i0 + n)
    top = tl.full([16], float("-inf"), WIDE)
    total = tl.zeros([16], WIDE)
    acc = tl.zeros([16, E], WIDE)
    for t in tl.range(part * each * steps, last * steps):
        entry = t // steps
        at = tl.load(Index + listed + entry) * SIZE + t % steps * BN
        col = t % steps * BN + tl.arange(0, BN)
        key = at + tl.arange(0, BN)
        k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, False)
        v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, False)
        past = entry - whole + tl.zeros([BN], tl.int32)
        keep = (past < 0) | ((key >= lo) & (key < hi))
        if BITS:
            tile = tl.load(Tile + listed + entry)
            words: tl.constexpr = (SIZE + 31) // 32
            mine = (past >= 0) & (col < SIZE)
            word = tl.load(Bits + tile.to(tl.int64) * words + col // 32, mask=mine, other=-1)
            keep = keep & (((word >> (col % 32)) & 1) != 0)
        keep = (keep & (col < SIZE) & (key < keys))[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
        top, total, acc = fold(tl.where(keep, s, float("-inf")), v, top, total, acc, scale)
    some = total > 0
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    slot = ((b * heads + h + r).to(tl.int64) * rows + n) * parts + part
    e = tl.arange(0, E)
    value = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(Parts + slot[:, None] * EDIM + e[None, :], value, mask=(r < span)[:, None] & (e < EDIM)[None, :])
    tl.store(Levels + slot, lse, mask=r < span)
