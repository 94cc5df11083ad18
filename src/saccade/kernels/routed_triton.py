"""Triton kernels for queries that choose key blocks one by one: choice, routing, attention over gathered rows, merge.

A slot is one choice of one query, number i T + t. Slots are listed by block, so that a block meets its queries in dense
tiles; each slot's partial result goes to its place and a query's slots merge. Every sum has its order, no atomics.

Legend: BM gathered rows and BN keys of a tile, MP blocks padded to a power of two, T choices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.kernels.sparse_triton import LN2, LOG2E, fold, read, row_stats, stats

CALL = [
    "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "i0", "heads", "groups", "rows", "keys", "size", "blocks",
    "choices", "most",
]  # fmt: skip


@triton.jit(
    do_not_specialize=["q0", "q1", "q2", "p0", "i0", "heads", "groups", "rows", "blocks", "size", "choices"]
)
def choose(
    Q, Mean, Rest, Index, Own, Ends, q0, q1, q2, p0, i0, heads, groups, rows, blocks, size, choices,
    BM: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BACK: tl.constexpr, SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Index (b, h, L, T) int32: the best blocks of each query by its product with their means, -1 where none is left.

    Means are Mean + Rest where SPLIT, (b, g, blocks, D). BACK leaves only blocks before Own (b or 1, L). Of equal
    scores the earlier block wins.
    """
    tiles = (rows + BM - 1) // BM
    pid = tl.program_id(0)
    head = pid // tiles
    first = pid % tiles * BM
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    i = first + tl.arange(0, BM)
    n = tl.arange(0, MP)
    q = read(Q, b, h, first, q0, q1, q2, rows, BM, D, DIM, True, False)
    m0 = groups * blocks * DIM
    mean = read(Mean, b, g, first * 0, m0, blocks * DIM, DIM, blocks, MP, D, DIM, True, False)
    s = tl.dot(q, tl.trans(mean), input_precision="ieee", out_dtype=WIDE)
    if SPLIT:
        rest = read(Rest, b, g, first * 0, m0, blocks * DIM, DIM, blocks, MP, D, DIM, True, False)
        s = tl.dot(q, tl.trans(rest), s, input_precision="ieee", out_dtype=WIDE)
    end = tl.load(Ends + b * p0)
    free = ((n < blocks) & (n * size < end))[None, :]
    if BACK:
        own = tl.load(Own + b * i0 + i, mask=i < rows, other=0)
        free = free & (n[None, :] < own[:, None])
    s = tl.where(free, s, float("-inf"))
    for t in range(choices):
        best, which = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        found = best > float("-inf")
        where = (head.to(tl.int64) * rows + i) * choices + t
        tl.store(Index + where, tl.where(found, which, -1), mask=i < rows)
        s = tl.where(n[None, :] == which[:, None], float("-inf"), s)


@triton.jit
def chosen(Index, head, i, rows, choices, BM: tl.constexpr, MP: tl.constexpr):
    """Whether rows i chose each block, (BM, MP) of 0 and 1."""
    n = tl.arange(0, MP)
    taken = tl.zeros([BM, MP], tl.int32)
    for t in range(choices):
        which = tl.load(Index + (head * rows + i) * choices + t, mask=i < rows, other=-1)
        taken += (n[None, :] == which[:, None]).to(tl.int32)
    return taken


@triton.jit(do_not_specialize=["rows", "blocks", "choices"])
def count(Index, Hist, rows, blocks, choices, SPAN: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr):
    """Hist (b h, spans, blocks): how often each block is chosen by SPAN rows, BM at a time."""
    spans = (rows + SPAN - 1) // SPAN
    pid = tl.program_id(0)
    head = (pid // spans).to(tl.int64)
    n = tl.arange(0, MP)
    total = tl.zeros([MP], tl.int32)
    for first in range(pid % spans * SPAN, pid % spans * SPAN + SPAN, BM):
        total += tl.sum(chosen(Index, head, first + tl.arange(0, BM), rows, choices, BM, MP), 0)
    tl.store(Hist + pid.to(tl.int64) * blocks + n, total, mask=n < blocks)


@triton.jit(do_not_specialize=["rows", "blocks", "choices"])
def place(Index, Base, Slots, rows, blocks, choices, SPAN: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr):
    """Slots (b h, L T): the slots of each block side by side, given where those of each span begin, Base like Hist."""
    spans = (rows + SPAN - 1) // SPAN
    pid = tl.program_id(0)
    head = (pid // spans).to(tl.int64)
    n = tl.arange(0, MP)
    base = tl.load(Base + pid.to(tl.int64) * blocks + n, mask=n < blocks, other=0)
    for first in range(pid % spans * SPAN, pid % spans * SPAN + SPAN, BM):
        i = first + tl.arange(0, BM)
        taken = chosen(Index, head, i, rows, choices, BM, MP)
        spot = tl.cumsum(taken, 0) - taken + base[None, :]
        for t in range(choices):
            which = tl.load(Index + (head * rows + i) * choices + t, mask=i < rows, other=-1)
            mine = tl.sum(tl.where(n[None, :] == which[:, None], spot, 0), 1)
            tl.store(Slots + head * rows * choices + mine, i * choices + t, mask=(i < rows) & (which >= 0))
        base += tl.sum(taken, 0)


@triton.jit
def gathered(x, b, h, i, kept, s0, s1, s2, D: tl.constexpr, DIM: tl.constexpr):
    """Rows i of x (b, h, n, DIM), zeros where not kept."""
    d = tl.arange(0, D)
    where = x + b.to(tl.int64) * s0 + h.to(tl.int64) * s1 + i[:, None].to(tl.int64) * s2 + d[None, :]
    if DIM == D:
        tile = tl.load(where, mask=kept[:, None], other=0.0)
    else:
        tile = tl.load(where, mask=kept[:, None] & (d < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def find(Tiles, head, tile, blocks):
    """The block that a tile of a head belongs to, of at most 2048, its first tile, and whether there is such a tile."""
    n = tl.arange(0, 2048)
    base = Tiles + head.to(tl.int64) * (blocks + 1)
    begins = tl.load(base + n, mask=n < blocks, other=2147483647)
    m = tl.sum((begins <= tile).to(tl.int32), 0) - 1
    return m, tl.load(base + m), tile < tl.load(base + blocks)


@triton.jit
def allowed(Lo, Hi, From, To, b, i0, i, kept, key, end):
    """Pairs of gathered rows and keys: inside [lo, hi), outside [from, to), before the end of the block."""
    lo = tl.load(Lo + b * i0 + i, mask=kept, other=0)[:, None]
    hi = tl.load(Hi + b * i0 + i, mask=kept, other=0)[:, None]
    skip = tl.load(From + b * i0 + i, mask=kept, other=0)[:, None]
    to = tl.load(To + b * i0 + i, mask=kept, other=0)[:, None]
    return (key >= lo) & (key < hi) & (key < end) & ((key < skip) | (key >= to))


@triton.jit(do_not_specialize=CALL)
def forward(
    Q, K, V, Slots, Starts, Counts, Tiles, Parts, Levels, Lo, Hi, From, To, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, i0, heads, groups, rows, keys, size, blocks, choices, most,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Parts (b h, L T, E) and Levels (b h, L T): each slot over the keys of its block, for BM slots of a block."""
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
    pid = tl.program_id(0)
    head = pid // most
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    m, begin, there = find(Tiles, head, pid % most, blocks)
    if there:
        place = (pid % most - begin) * BM + tl.arange(0, BM)
        kept = place < tl.load(Counts + head * blocks + m)
        base = head.to(tl.int64) * rows * choices
        slot = tl.load(Slots + base + tl.load(Starts + head * blocks + m) + place, mask=kept, other=0)
        i = slot // choices
        q = gathered(Q, b, h, i, kept, q0, q1, q2, D, DIM)
        top = tl.full([BM], float("-inf"), WIDE)
        total = tl.zeros([BM], WIDE)
        acc = tl.zeros([BM, E], WIDE)
        for n in tl.range(0, size, BN):
            at = m * size + n
            k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, TMA)
            v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, TMA)
            s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
            if MASKED:
                key = (at + tl.arange(0, BN))[None, :]
                s = tl.where(
                    allowed(Lo, Hi, From, To, b, i0, i, kept, key, m * size + size), s, float("-inf")
                )
            top, total, acc = fold(s, v, top, total, acc, scale)
        some = total > 0
        lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
        e = tl.arange(0, E)
        value = (acc / tl.where(some, total, 1.0)[:, None]).to(Parts.dtype.element_ty)
        where = Parts + (base + slot)[:, None] * EDIM + e[None, :]
        tl.store(where, value, mask=kept[:, None] & (e < EDIM)[None, :])
        tl.store(Levels + base + slot, lse, mask=kept)


@triton.jit(do_not_specialize=["rows", "choices"])
def merge(
    Parts, Levels, Out, Lse, rows, choices,
    BM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr, BESIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Out (rows, E) and Lse (rows,): the softmax mix of parts (rows, T, E), and of what they hold where BESIDE."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, E)
    inside = r < rows
    where = r[:, None] * EDIM + e[None, :]
    box = inside[:, None] & (e < EDIM)[None, :]
    own = tl.full([BM], float("-inf"), WIDE)
    if BESIDE:
        own = tl.load(Lse + r, mask=inside, other=float("-inf"))
    top = own
    for t in range(choices):
        top = tl.maximum(top, tl.load(Levels + r * choices + t, mask=inside, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2((own - base) * LOG2E)
    acc = tl.zeros([BM, E], WIDE)
    if BESIDE:
        acc += tl.load(Out + where, mask=box, other=0.0).to(WIDE) * total[:, None]
    for t in range(choices):
        level = tl.load(Levels + r * choices + t, mask=inside, other=float("-inf"))
        share = tl.exp2((level - base) * LOG2E)
        there = box & (level > float("-inf"))[:, None]
        part = tl.load(Parts + (r * choices + t)[:, None] * EDIM + e[None, :], mask=there, other=0.0)
        acc += part.to(WIDE) * share[:, None]
        total += share
    some = total > 0
    tl.store(Out + where, (acc / tl.where(some, total, 1.0)[:, None]).to(Out.dtype.element_ty), mask=box)
    lse = tl.where(some, base + tl.log2(tl.where(some, total, 1.0)) * LN2, float("-inf"))
    tl.store(Lse + r, lse, mask=inside)


@triton.jit(do_not_specialize=["rows", "choices"])
def add(
    Parts, Index, Sum, rows, choices, BM: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr
):
    """Sum (rows, D) and the parts (rows, T, D) of the slots that were chosen."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    where = r[:, None] * DIM + d[None, :]
    box = (r < rows)[:, None] & (d < DIM)[None, :]
    acc = tl.load(Sum + where, mask=box, other=0.0).to(WIDE)
    for t in range(choices):
        taken = tl.load(Index + r * choices + t, mask=r < rows, other=-1) >= 0
        part = Parts + (r * choices + t)[:, None] * DIM + d[None, :]
        acc += tl.load(part, mask=box & taken[:, None], other=0.0).to(WIDE)
    tl.store(Sum + where, acc.to(Sum.dtype.element_ty), mask=box)


@triton.jit(do_not_specialize=[*CALL, "g0", "g1", "g2"])
def backward_queries(
    Q, K, V, Grad, Lse, Delta, Slots, Starts, Counts, Tiles, Parts, Lo, Hi, From, To, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, i0, heads, groups, rows, keys, size, blocks, choices, most,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Parts (b h, L T, D): what each slot adds to the gradient of its query."""
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
        g0, g1, g2 = g0 // 8 * 8, g1 // 8 * 8, g2 // 8 * 8
    pid = tl.program_id(0)
    head = pid // most
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    m, begin, there = find(Tiles, head, pid % most, blocks)
    if there:
        place = (pid % most - begin) * BM + tl.arange(0, BM)
        kept = place < tl.load(Counts + head * blocks + m)
        base = head.to(tl.int64) * rows * choices
        slot = tl.load(Slots + base + tl.load(Starts + head * blocks + m) + place, mask=kept, other=0)
        i = slot // choices
        q = gathered(Q, b, h, i, kept, q0, q1, q2, D, DIM)
        grad = gathered(Grad, b, h, i, kept, g0, g1, g2, E, EDIM)
        lse, delta = stats(Lse, Delta, head.to(tl.int64) * rows, i, kept)
        acc = tl.zeros([BM, D], WIDE)
        for n in tl.range(0, size, BN):
            at = m * size + n
            k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, TMA)
            v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, TMA)
            s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE)
            if MASKED:
                key = (at + tl.arange(0, BN))[None, :]
                s = tl.where(
                    allowed(Lo, Hi, From, To, b, i0, i, kept, key, m * size + size), s, float("-inf")
                )
            p = tl.exp2(s * scale - lse[:, None])
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=WIDE)
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee", out_dtype=WIDE)
        d = tl.arange(0, D)
        where = Parts + (base + slot)[:, None] * DIM + d[None, :]
        value = (acc * (scale * LN2)).to(Parts.dtype.element_ty)
        tl.store(where, value, mask=kept[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=[*CALL, "g0", "g1", "g2"])
def backward_keys(
    Q, K, V, Grad, Lse, Delta, DK, DV, Slots, Starts, Counts, Lo, Hi, From, To, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, i0, heads, groups, rows, keys, size, blocks, choices, most,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add to DK and DV (b, g, S, .) what the slots of each block bring: one program for BN keys of one block.

    Lse and Delta (b h, L T) are in the order of the slots, so that they can be loaded ahead.
    """
    if ALIGN:
        q0, q1, q2 = q0 // 8 * 8, q1 // 8 * 8, q2 // 8 * 8
        k0, k1, k2 = k0 // 8 * 8, k1 // 8 * 8, k2 // 8 * 8
        v0, v1, v2 = v0 // 8 * 8, v1 // 8 * 8, v2 // 8 * 8
        g0, g1, g2 = g0 // 8 * 8, g1 // 8 * 8, g2 // 8 * 8
    tiles = (size + BN - 1) // BN
    pid = tl.program_id(0)
    m = pid // tiles % blocks
    head = pid // (tiles * blocks)
    b, g = head // groups, head % groups
    at = m * size + pid % tiles * BN
    key = at + tl.arange(0, BN)
    end = m * size + size
    k = read(K, b, g, at, k0, k1, k2, keys, BN, D, DIM, True, False)
    v = read(V, b, g, at, v0, v1, v2, keys, BN, E, EDIM, True, False)
    dk = tl.zeros([BN, D], WIDE)
    dv = tl.zeros([BN, E], WIDE)
    for r in range(heads // groups):
        h = g * (heads // groups) + r
        own = b * heads + h
        number = tl.load(Counts + own * blocks + m)
        first = own * (rows * choices) + tl.load(Starts + own * blocks + m)
        lse, delta = row_stats(Lse, Delta, first, pid * 0, number, BM)
        for n in tl.range(0, number, BM):
            kept = n + tl.arange(0, BM) < number
            i = tl.load(Slots + first + n + tl.arange(0, BM), mask=kept, other=0) // choices
            q = gathered(Q, b, h, i, kept, q0, q1, q2, D, DIM)
            grad = gathered(Grad, b, h, i, kept, g0, g1, g2, E, EDIM)
            s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=WIDE)
            if MASKED:
                s = tl.where(
                    tl.trans(allowed(Lo, Hi, From, To, b, i0, i, kept, key[None, :], end)), s, float("-inf")
                )
            p = tl.exp2(s * scale - lse[None, :])
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee", out_dtype=WIDE)
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee", out_dtype=WIDE)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=WIDE)
            lse, delta = row_stats(Lse, Delta, first, n + BM, number, BM)
    inside = (key < end) & (key < keys)
    d, e = tl.arange(0, D), tl.arange(0, E)
    row = (head.to(tl.int64) * keys + key)[:, None]
    box = inside[:, None] & (d < DIM)[None, :]
    have = tl.load(DK + row * DIM + d[None, :], mask=box, other=0.0).to(WIDE)
    tl.store(DK + row * DIM + d[None, :], (have + dk * (scale * LN2)).to(DK.dtype.element_ty), mask=box)
    box = inside[:, None] & (e < EDIM)[None, :]
    have = tl.load(DV + row * EDIM + e[None, :], mask=box, other=0.0).to(WIDE)
    tl.store(DV + row * EDIM + e[None, :], (have + dv).to(DV.dtype.element_ty), mask=box)
