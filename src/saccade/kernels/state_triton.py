"""Triton kernels for a state that tokens add to: sums over segments, states between segments, outputs and gradients.

A sequence is cut into segments that run side by side, a segment into chunks of C tokens that run in turn. Inside a chunk
pairs meet as matrix products, and decays as exponentials of sums between the two tokens, never above 1. (Yang et al.,
Gated Linear Attention Transformers with Hardware-Efficient Training, 2024.)

Legend: b batch, h query head, g state head, p segment, D and E feature and value channels of a tile, DIM and EDIM all of them.
DECAY is 0 for none, 1 for one number a token, 2 for one a channel, whose tiles `channel_triton` prepares.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(x, b, h, first, col, s0, s1, s2, end, N: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr):
    """Rows [first, first + N) and columns [col, col + W) of x (b, h, end, SIZE), zeros beyond."""
    at = first + tl.arange(0, N)
    c = col + tl.arange(0, W)
    where = x + b.to(tl.int64) * s0 + h.to(tl.int64) * s1 + at[:, None].to(tl.int64) * s2 + c[None, :]
    if SIZE % W == 0:
        found = tl.load(where, mask=(at < end)[:, None], other=0.0)
    else:
        found = tl.load(where, mask=(at < end)[:, None] & (c < SIZE)[None, :], other=0.0)
    return found


@triton.jit
def put(x, value, head, first, col, end, N: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr):
    """Store rows [first, first + N) and columns [col, col + W) of contiguous x (heads, end, SIZE)."""
    at = first + tl.arange(0, N)
    c = col + tl.arange(0, W)
    where = x + (head.to(tl.int64) * end + at[:, None]) * SIZE + c[None, :]
    box = (at < end)[:, None] & (c < SIZE)[None, :]
    tl.store(where, value.to(x.dtype.element_ty), mask=box)


@triton.jit
def mapped(x, at, end, col, W: tl.constexpr, SIZE: tl.constexpr, ELU: tl.constexpr):
    """phi of rows `at` and columns from `col`, zeros from row `end` and column SIZE on."""
    if ELU:
        wide = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
        phi = tl.where(wide > 0, wide + 1, tl.exp(tl.minimum(wide, 0.0)))
        inside = (at < end)[:, None]
        if SIZE % W != 0:
            inside = inside & (col + tl.arange(0, W) < SIZE)[None, :]
        x = tl.where(inside, phi, 0.0).to(x.dtype)
    return x


@triton.jit
def unmapped(grad, x, ELU: tl.constexpr):
    """The gradient of x, given that of phi(x)."""
    if ELU:
        wide = x.to(grad.dtype)
        grad = tl.where(wide > 0, grad, grad * tl.exp(tl.minimum(wide, 0.0)))
    return grad


@triton.jit
def times(x, y, acc):
    """acc + x y."""
    return tl.dot(x, y, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def read(x, s, WIDE: tl.constexpr):
    """x s for a state s: in the precision of x, but float16, whose range a state may leave, in tf32."""
    if x.dtype == tl.float16:
        found = tl.dot(x.to(tl.float32), s, input_precision="tf32")
    else:
        found = tl.dot(x, s.to(x.dtype), input_precision="ieee", out_dtype=WIDE)
    return found


@triton.jit
def sums(Log, b, g, first, l0, l1, l2, rows, C: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr):
    """Logarithms summed from the start of the chunk through each token, and over all of it; Log (b or 1, g, rows or 1)."""
    i = tl.arange(0, C)
    if FIXED:
        log = tl.load(Log + b * l0 + g * l1).to(WIDE)
        found = log * (tl.minimum(i + 1, rows - first)).to(WIDE), log * tl.minimum(rows - first, C).to(WIDE)
    else:
        at = first + i
        log = tl.load(Log + b * l0 + g * l1 + at.to(tl.int64) * l2, mask=at < rows, other=0.0).to(WIDE)
        found = tl.cumsum(log, 0), tl.sum(log, 0)
    return found


@triton.jit
def later(C: tl.constexpr):
    """Whether column i is no earlier than row j."""
    i = tl.arange(0, C)
    return i[:, None] <= i[None, :]


@triton.jit
def earlier(C: tl.constexpr):
    """Whether column j is no later than row i."""
    i = tl.arange(0, C)
    return i[:, None] >= i[None, :]


@triton.jit
def weights(G, C: tl.constexpr):
    """exp(G_i - G_j) for column j <= row i, else 0."""
    return tl.exp(tl.where(earlier(C), G[:, None] - G[None, :], float("-inf")))


@triton.jit
def weights_after(G, C: tl.constexpr):
    """exp(G_i - G_j) for column i >= row j, else 0."""
    return tl.exp(tl.where(later(C), G[None, :] - G[:, None], float("-inf")))


@triton.jit
def reach(
    Log, b, g, first, l0, l1, l2, rows, C: tl.constexpr, FIXED: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What pairs of a chunk keep, a row of the reader each; what readers and writers keep to its borders; what it keeps."""
    G, last = sums(Log, b, g, first, l0, l1, l2, rows, C, FIXED, WIDE)
    if BACK:
        found = weights_after(G, C), tl.exp(last - G), tl.exp(G), tl.exp(last)
    else:
        found = weights(G, C), tl.exp(G), tl.exp(last - G), tl.exp(last)
    return found


@triton.jit
def keeps(Keep, head, chunks, n, D: tl.constexpr, DIM: tl.constexpr):
    """How much of each channel survives chunk n of a head; Keep (heads, chunks, DIM)."""
    d = tl.arange(0, D)
    return tl.load(Keep + (head.to(tl.int64) * chunks + n) * DIM + d, mask=d < DIM, other=0.0)


@triton.jit
def held(S, number, row, col, D: tl.constexpr, E: tl.constexpr, DIM: tl.constexpr, EDIM: tl.constexpr):
    """Where rows from `row` and columns from `col` of state `number` stand in S (., DIM, EDIM), and which exist."""
    d = row + tl.arange(0, D)
    e = col + tl.arange(0, E)
    where = S + number.to(tl.int64) * (DIM * EDIM) + d[:, None] * EDIM + e[None, :]
    return where, (d < DIM)[:, None] & (e < EDIM)[None, :]


@triton.jit(do_not_specialize=["heads", "groups", "rows", "chunks", "per", "segments"])
def segment_sums(
    X, Y, Extra, Log, Keep, Ends, S, Z, x0, x1, x2, y0, y1, y2, n0, l0, l1, l2,
    heads, groups, rows, chunks, per, segments,
    C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    DECAY: tl.constexpr, FIXED: tl.constexpr, RATIO: tl.constexpr, BACK: tl.constexpr, ELU: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """S (b heads, segments, DIM, EDIM): what each segment adds to a state, decayed to its end, and Z (b heads, segments, DIM).

    X are keys and Y values; where BACK, queries and gradients, decayed to the start of the segment, Z weighed by Extra.
    """
    parts: tl.constexpr = (EDIM + E - 1) // E
    pid = tl.program_id(0)
    col = pid % parts * E
    p = pid // parts % segments
    head = pid // (parts * segments)
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    end = rows if BACK else tl.load(Ends + b * n0)
    s = tl.zeros([D, E], WIDE)
    z = tl.zeros([D], WIDE)
    start = p * per
    stop = tl.minimum(start + per, chunks)
    for m in tl.range(start, stop):
        n = start + stop - 1 - m if BACK else m
        first = n * C
        at = first + tl.arange(0, C)
        x = mapped(tile(X, b, h, first, 0, x0, x1, x2, end, C, D, DIM), at, end, 0, D, DIM, ELU)
        y = tile(Y, b, h, first, col, y0, y1, y2, end, C, E, EDIM)
        share = tl.full([C], 1.0, WIDE)
        if DECAY == 1:
            G, last = sums(Log, b, g, first, l0, l1, l2, rows, C, FIXED, WIDE)
            share = tl.exp(G) if BACK else tl.exp(last - G)
            y = (y * share[:, None]).to(y.dtype)
            s = s * tl.exp(last)
            z = z * tl.exp(last)
        if DECAY == 2:
            keep = keeps(Keep, b * groups + g, chunks, n, D, DIM)
            s = s * keep[:, None]
            z = z * keep
        s = times(tl.trans(x), y, s)
        if RATIO:
            if BACK:
                share = share * tl.load(Extra + head.to(tl.int64) * rows + at, mask=at < rows, other=0.0)
            z += tl.sum(x * share[:, None], 0)
    where, box = held(S, pid // parts, 0, col, D, E, DIM, EDIM)
    tl.store(where, s, mask=box)
    if RATIO and col == 0:
        d = tl.arange(0, D)
        tl.store(Z + (pid // parts).to(tl.int64) * DIM + d, z, mask=d < DIM)


@triton.jit(do_not_specialize=["segments", "spread", "f0", "f1", "f2"])
def between(
    S, First, Fall, segments, spread, f0, f1, f2,
    N: tl.constexpr, DIM: tl.constexpr, EDIM: tl.constexpr, DECAY: tl.constexpr, BACK: tl.constexpr,
    GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Turn what segments add, S (heads, segments, DIM, EDIM), into the state that each begins with, from First (heads, DIM, EDIM).

    Fall is the logarithm of what survives a segment; where BACK the sequence runs from its end.
    """
    size: tl.constexpr = DIM * EDIM
    parts: tl.constexpr = (size + N - 1) // N
    pid = tl.program_id(0)
    head = (pid // parts).to(tl.int64)
    at = pid % parts * N + tl.arange(0, N)
    inside = at < size
    s = tl.zeros([N], WIDE)
    if GIVEN:
        s = tl.load(First + head * size + at, mask=inside, other=0.0).to(WIDE)
    for m in range(segments):
        p = segments - 1 - m if BACK else m
        where = S + (head * segments + p) * size + at
        own = tl.load(where, mask=inside, other=0.0)
        tl.store(where, s, mask=inside)
        if DECAY:
            owner = head // spread
            fall = tl.load(Fall + owner * f0 + p * f1 + at // EDIM * f2, mask=inside, other=0.0)
            s = s * tl.exp(fall)
        s = s + own


@triton.jit
def floor(WIDE: tl.constexpr):
    """The least sum that divides."""
    return 4.1e-247 if tl.float64 == WIDE else 4.17e-31


@triton.jit
def square(A, head, chunks, n, C: tl.constexpr):
    """Chunk n of A (heads, chunks, C, C)."""
    i = tl.arange(0, C)
    return tl.load(A + ((head.to(tl.int64) * chunks + n) * C + i[:, None]) * C + i[None, :])


@triton.jit(do_not_specialize=["heads", "groups", "rows", "chunks", "per", "segments"])
def values(
    X, Y, V, A, Log, Keep, Ends, S, Z, Out, Total, Last, Lastz,
    x0, x1, x2, y0, y1, y2, v0, v1, v2, n0, l0, l1, l2, heads, groups, rows, chunks, per, segments,
    C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    DECAY: tl.constexpr, FIXED: tl.constexpr, RATIO: tl.constexpr, ELU: tl.constexpr, GIVEN: tl.constexpr, FINAL: tl.constexpr,
    BACK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Out (b, heads, rows, EDIM): sums of values V, weighed by the products of phi(X) with phi(Y), and the state at the end.

    Queries X read keys Y and what they wrote before, divided by Total (b, heads, rows) where RATIO. Where BACK, keys X read
    queries Y and gradients V that come after, and Out is the gradient of values. S (heads, segments, DIM, EDIM) and Z
    (heads, segments, DIM) are the states that segments begin with, where GIVEN; Last and Lastz the one that is left, where FINAL.
    """
    parts: tl.constexpr = (EDIM + E - 1) // E
    pid = tl.program_id(0)
    col = pid % parts * E
    p = pid // parts % segments
    head = pid // (parts * segments)
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    owner = b * groups + g
    end = tl.load(Ends + b * n0)
    d = tl.arange(0, D)
    s = tl.zeros([D, E], WIDE)
    z = tl.zeros([D], WIDE)
    own = (head if BACK else owner) * segments + p
    if GIVEN:
        where, box = held(S, own, 0, col, D, E, DIM, EDIM)
        s = tl.load(where, mask=box, other=0.0)
        if RATIO:
            z = tl.load(Z + own.to(tl.int64) * DIM + d, mask=d < DIM, other=0.0)
    hx, hy, ex, ey = (g, h, end, rows) if BACK else (h, g, rows, end)
    start = p * per
    stop = tl.minimum(start + per, chunks)
    for m in tl.range(start, stop):
        n = start + stop - 1 - m if BACK else m
        first = n * C
        at = first + tl.arange(0, C)
        x = mapped(tile(X, b, hx, first, 0, x0, x1, x2, ex, C, D, DIM), at, ex, 0, D, DIM, ELU)
        y = mapped(tile(Y, b, hy, first, 0, y0, y1, y2, ey, C, D, DIM), at, ey, 0, D, DIM, ELU)
        v = tile(V, b, hy, first, col, v0, v1, v2, ey, C, E, EDIM)
        acc = read(x, s, WIDE)
        if DECAY == 2:
            a = square(A, head, chunks, n, C)
            a = tl.trans(a) if BACK else a
        else:
            a = times(x, tl.trans(y), tl.zeros([C, C], WIDE))
        if DECAY == 1:
            pairs, into, left, keep = reach(Log, b, g, first, l0, l1, l2, rows, C, FIXED, BACK, WIDE)
            a = a * pairs
            acc = acc * into[:, None]
        if DECAY == 0:
            a = tl.where(later(C) if BACK else earlier(C), a, 0.0)
        acc = times(a.to(v.dtype), v, acc)
        if RATIO:
            past = tl.sum(x * z[None, :], 1)
            if DECAY == 1:
                past = past * into
            total = tl.sum(a.to(WIDE), 1) + past
            acc = acc / tl.maximum(total, floor(WIDE))[:, None]
            if col == 0:
                tl.store(Total + head.to(tl.int64) * rows + at, total, mask=at < rows)
        put(Out, acc, head, first, col, rows, C, E, EDIM)
        if DECAY == 1:
            v = (v * left[:, None]).to(v.dtype)
            s = s * keep
            if RATIO:
                z = z * keep + tl.sum(y * left[:, None], 0)
        else:
            if DECAY == 2:
                fade = keeps(Keep, owner, chunks, n, D, DIM)
                s = s * fade[:, None]
                z = z * fade
            if RATIO:
                z += tl.sum(y.to(WIDE), 0)
        s = times(tl.trans(y), v, s)
    if FINAL:
        if BACK:
            mine = p == 0
        else:
            mine = (p == segments - 1) & (h % (heads // groups) == 0)
        if mine:
            left_over = head if BACK else owner
            where, box = held(Last, left_over, 0, col, D, E, DIM, EDIM)
            tl.store(where, s, mask=box)
            if RATIO and col == 0:
                tl.store(Lastz + left_over.to(tl.int64) * DIM + d, z, mask=d < DIM)


@triton.jit(do_not_specialize=["heads", "groups", "rows", "chunks", "per", "segments"])
def features(
    X, Y, V, Of, Extra, Log, Keep, Ends, S, Z, Out, Dots, Last,
    x0, x1, x2, y0, y1, y2, v0, v1, v2, o0, o1, o2, n0, l0, l1, l2, heads, groups, rows, chunks, per, segments,
    C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, E: tl.constexpr, EDIM: tl.constexpr,
    DECAY: tl.constexpr, FIXED: tl.constexpr, RATIO: tl.constexpr, ELU: tl.constexpr, GIVEN: tl.constexpr, FINAL: tl.constexpr,
    BACK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Out (b, heads, rows, DIM), the gradient of queries Of, and Dots, its products with phi(Of) where DECAY is 1.

    Gradients X meet values Y and keys V before them. Where BACK, values X meet gradients Y and queries V after them, and Out is
    the gradient of keys Of. Extra (b, heads, rows) is the gradient of the sums of weights. S and Z are states as in `values`;
    Last gets the gradient of the sum of features before the first token, where FINAL. Where DECAY is 2, Out holds what
    comes through states.
    """
    parts: tl.constexpr = (DIM + D - 1) // D
    pid = tl.program_id(0)
    col = pid % parts * D
    p = pid // parts % segments
    head = pid // (parts * segments)
    b, h = head // heads, head % heads
    g = h // (heads // groups)
    owner = b * groups + g
    end = tl.load(Ends + b * n0)
    d = col + tl.arange(0, D)
    s = tl.zeros([E, D], WIDE)
    z = tl.zeros([D], WIDE)
    own = ((head if BACK else owner) * segments + p).to(tl.int64)
    if GIVEN:
        e = tl.arange(0, E)
        where = S + own * (DIM * EDIM) + e[:, None] + d[None, :] * EDIM
        s = tl.load(where, mask=(e < EDIM)[:, None] & (d < DIM)[None, :], other=0.0)
        if RATIO:
            z = tl.load(Z + own * DIM + d, mask=d < DIM, other=0.0)
    hx, hy, ex, ey = (g, h, end, rows) if BACK else (h, g, rows, end)
    start = p * per
    stop = tl.minimum(start + per, chunks)
    for m in tl.range(start, stop):
        n = start + stop - 1 - m if BACK else m
        first = n * C
        at = first + tl.arange(0, C)
        x = tile(X, b, hx, first, 0, x0, x1, x2, ex, C, E, EDIM)
        y = tile(Y, b, hy, first, 0, y0, y1, y2, ey, C, E, EDIM)
        v = mapped(tile(V, b, hy, first, col, v0, v1, v2, ey, C, D, DIM), at, ey, col, D, DIM, ELU)
        acc = read(x, s, WIDE)
        if RATIO:
            extra = tl.load(Extra + head.to(tl.int64) * rows + at, mask=at < rows, other=0.0)
            acc += z[None, :] if BACK else extra[:, None] * z[None, :]
        if DECAY == 1:
            pairs, into, left, keep = reach(Log, b, g, first, l0, l1, l2, rows, C, FIXED, BACK, WIDE)
            acc = acc * into[:, None]
        if DECAY < 2:
            a = times(x, tl.trans(y), tl.zeros([C, C], WIDE))
            if RATIO:
                a += extra[None, :] if BACK else extra[:, None]
            a = a * pairs if DECAY == 1 else tl.where(later(C) if BACK else earlier(C), a, 0.0)
            acc = times(a.to(v.dtype), v, acc)
        if (DECAY == 1) | ELU:
            of = tile(Of, b, hx, first, col, o0, o1, o2, ex, C, D, DIM)
            if DECAY == 1:
                dots = tl.sum(mapped(of, at, ex, col, D, DIM, ELU) * acc, 1)
                tl.store(Dots + (head * parts + pid % parts).to(tl.int64) * rows + at, dots, mask=at < rows)
            acc = unmapped(acc, of, ELU)
        if BACK & RATIO:
            acc = tl.where((at < ex)[:, None], acc, 0.0)
        put(Out, acc, head, first, col, rows, C, D, DIM)
        if RATIO:
            share = tl.full([C], 1.0, WIDE)
            if BACK:
                share = extra
            if DECAY == 1:
                share = share * left
                z = z * keep
            if DECAY == 2:
                z = z * tl.load(Keep + (owner.to(tl.int64) * chunks + n) * DIM + d, mask=d < DIM, other=0.0)
            z += tl.sum(v * share[:, None], 0)
        if DECAY == 1:
            v = (v * left[:, None]).to(v.dtype)
            s = s * keep
        if DECAY == 2:
            fade = tl.load(Keep + (owner.to(tl.int64) * chunks + n) * DIM + d, mask=d < DIM, other=0.0)
            s = s * fade[None, :]
        s = times(tl.trans(y), v, s)
    if FINAL and RATIO and p == 0:
        tl.store(Last + head.to(tl.int64) * DIM + d, z, mask=d < DIM)
